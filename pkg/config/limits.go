package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

const (
	// MinMemory is the least memory limit: less than nydusd needs to start is a
	// mistake.
	MinMemory = 16 << 20
	// maxMemory and maxCPU keep what they are multiplied with in range.
	maxMemory = 1 << 50
	maxCPU    = 10_000
	// minCPU is the least that the kernel can do: a millisecond in a tenth of a
	// second.
	minCPU = 10
)

// Limits is what each daemon may use at most; 0 is no limit.
type Limits struct {
	// Memory is in bytes.
	Memory int64
	// CPU is in thousandths of a core.
	CPU int
}

// Limits resolves what c asks for on a machine with that much memory, in bytes,
// and that many CPUs. c must be valid.
func (c Cgroup) Limits(memory int64, cpus int) (Limits, error) {
	wanted, err := parseMemory(c.Memory)
	if err != nil {
		return Limits{}, fmt.Errorf("cgroup.memory: %w", err)
	}
	cores, err := parseCPU(c.CPU)
	if err != nil {
		return Limits{}, fmt.Errorf("cgroup.cpu: %w", err)
	}
	l := Limits{Memory: int64(wanted.of(float64(memory))), CPU: int(math.Round(cores.of(float64(cpus) * 1000)))}
	// Of a very small machine.
	if wanted.set() && l.Memory < MinMemory {
		return Limits{}, fmt.Errorf("cgroup.memory: %s of this machine's memory is %d bytes, and nydusd needs %d; set a larger one", c.Memory, l.Memory, int64(MinMemory))
	}
	if cores.set() {
		l.CPU = max(l.CPU, minCPU)
	}
	return l, nil
}

// amount is a number, or a part of what the machine has.
type amount struct{ number, part float64 }

func (a amount) set() bool              { return a != amount{} }
func (a amount) of(all float64) float64 { return a.number + a.part*all }

// parseMemory reads bytes or a percentage.
func parseMemory(text string) (amount, error) {
	if text == "" {
		return amount{}, nil
	}
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		return parsePercent(text, percent)
	}
	n, ok := scaled(text, "KMG")
	if !ok && n == 0 {
		return amount{}, fmt.Errorf(`%q: want bytes as a whole number, with K, M or G behind it (of 1024) such as "256M", or a percentage of the machine's memory such as "10%%", or nothing`, text)
	}
	if n > maxMemory || n < MinMemory {
		return amount{}, fmt.Errorf("%q: want 16M, which nydusd needs to start, to %dG", text, maxMemory>>30)
	}
	return amount{number: float64(n)}, nil
}

// parseCPU reads cores, in thousandths, or a percentage.
func parseCPU(text string) (amount, error) {
	if text == "" {
		return amount{}, nil
	}
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		return parsePercent(text, percent)
	}
	n, err := parseDecimal(text)
	if err != nil {
		return amount{}, fmt.Errorf(`%q: want a number of cores such as "1.5", or a percentage of all CPUs such as "25%%", or nothing`, text)
	}
	if n < minCPU/1000.0 || n > maxCPU {
		return amount{}, fmt.Errorf("%q: want 0.01 to %d cores", text, maxCPU)
	}
	return amount{number: n * 1000}, nil
}

func parsePercent(text, number string) (amount, error) {
	n, err := parseDecimal(number)
	if err != nil || n <= 0 || n > 100 {
		return amount{}, fmt.Errorf("%q: want a percentage above 0%% and up to 100%%", text)
	}
	return amount{part: n / 100}, nil
}

// parseDecimal reads what people write as a number, without the exponents,
// infinities and hexadecimal digits of other formats.
func parseDecimal(text string) (float64, error) {
	if strings.Trim(text, "0123456789.") != "" {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseFloat(text, 64)
}
