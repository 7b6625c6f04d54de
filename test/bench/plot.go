package main

import (
	"bytes"
	"fmt"
	"image/color"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

var (
	barColor    = color.RGBA{R: 0x7a, G: 0xa6, B: 0xc2, A: 0xff}
	dotColor    = color.RGBA{R: 0x1f, G: 0x3d, B: 0x5a, A: 0xff}
	targetColor = color.RGBA{R: 0xc0, G: 0x30, B: 0x28, A: 0xff}
	peerColor   = color.RGBA{R: 0x60, G: 0x60, B: 0x60, A: 0xff}
)

// plot is the ratios as an SVG file.
func (r *report) plot() ([]byte, error) {
	p, err := r.draw()
	if err != nil {
		return nil, err
	}
	canvas := vgsvg.New(8*vg.Inch, vg.Length(len(r.Results))*vg.Points(36)+vg.Points(60))
	p.Draw(draw.New(canvas))
	var b bytes.Buffer
	_, err = canvas.WriteTo(&b)
	return b.Bytes(), err
}

// draw draws the ratios as horizontal bars, the first work on top.
func (r *report) draw() (*plot.Plot, error) {
	p := plot.New()
	p.BackgroundColor = color.White
	p.X.Label.Text = "time as a multiple of the peer's; dashed: the peer, red: the target"
	p.X.Min, p.X.Max = 0, 1.1
	count := len(r.Results)
	bars, names := make(plotter.Values, count), make([]string, count)
	var dots plotter.XYs
	var marks []plot.Plotter
	for n, x := range r.Results {
		row := count - 1 - n
		bars[row], names[row] = x.ratio(), fmt.Sprintf("%s: %.2f", x.Name, x.ratio())
		for i, pair := range x.pairs() {
			// Spread a little, so that equal ones can be told apart.
			dots = append(dots, plotter.XY{X: pair, Y: float64(row) + 0.06*(float64(i%5)-2)})
			p.X.Max = max(p.X.Max, pair*1.05)
		}
		if x.Target > 0 {
			marks = append(marks, vertical(x.Target, float64(row)-0.4, float64(row)+0.4, draw.LineStyle{Color: targetColor, Width: vg.Points(2)}))
			p.X.Max = max(p.X.Max, x.Target*1.05)
		}
	}
	chart, err := plotter.NewBarChart(bars, vg.Points(18))
	if err != nil {
		return nil, err
	}
	chart.Horizontal, chart.Color, chart.LineStyle.Width = true, barColor, 0
	scatter, err := plotter.NewScatter(dots)
	if err != nil {
		return nil, err
	}
	scatter.GlyphStyle = draw.GlyphStyle{Color: dotColor, Radius: vg.Points(1.6), Shape: draw.CircleGlyph{}}
	p.Add(chart, vertical(1, -0.5, float64(count)-0.5, draw.LineStyle{Color: peerColor, Width: vg.Points(1), Dashes: []vg.Length{3, 3}}), scatter)
	p.Add(marks...)
	p.NominalY(names...)
	return p, nil
}

// vertical is a line at x from low to high.
func vertical(x, low, high float64, style draw.LineStyle) plot.Plotter {
	return &plotter.Line{XYs: plotter.XYs{{X: x, Y: low}, {X: x, Y: high}}, LineStyle: style}
}
