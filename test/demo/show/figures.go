package show

import (
	"fmt"
	"time"
)

// Bytes writes a number of bytes with three figures, in units of 1000.
func Bytes(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n)
	for _, unit := range []string{"kB", "MB", "GB"} {
		if f /= 1000; f < 999.5 {
			return fmt.Sprintf("%s %s", three(f), unit)
		}
	}
	return fmt.Sprintf("%s TB", three(f/1000))
}

// Duration writes a duration with three figures.
func Duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return three(float64(d)/float64(time.Microsecond)) + " µs"
	case d < time.Second:
		return three(float64(d)/float64(time.Millisecond)) + " ms"
	case d < 100*time.Second:
		return three(d.Seconds()) + " s"
	}
	return d.Round(time.Second).String()
}

func three(f float64) string {
	switch {
	case f < 9.995:
		return fmt.Sprintf("%.2f", f)
	case f < 99.95:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.0f", f)
}
