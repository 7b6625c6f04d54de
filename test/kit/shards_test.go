package kit

import (
	"slices"
	"testing"
)

func TestDeal(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	for n, want := range map[int][]string{1: {"abcde"}, 2: {"ace", "bd"}, 3: {"ad", "be", "c"}, 9: {"a", "b", "c", "d", "e"}} {
		var got []string
		for _, part := range deal(names, n) {
			text := ""
			for _, name := range part {
				text += name
			}
			got = append(got, text)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d parts: %q, want %q", n, got, want)
		}
	}
}
