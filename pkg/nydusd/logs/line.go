package logs

import (
	"fmt"
	"log/slog"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxLine is how much of a line is looked at, maxText how much of it is
	// passed on, in bytes.
	maxLine = 16 << 10
	maxText = 2 << 10
)

// Line is a line of a daemon's log that is safe to be shown: one line of printable
// text of bounded length, without what looks like a credential.
type Line struct {
	Level slog.Level
	// Time is what the daemon says when it was, empty when it does not.
	Time string
	Text string
}

// Level tells how much a line matters. before is the level of the line before it, of
// which one that has none of its own may be a part. What nydusd calls info tells an
// operator of many images little: it is debug here.
func Level(raw string, before slog.Level) slog.Level {
	if strings.Contains(raw, "panicked at ") {
		return slog.LevelError
	}
	// What stands in front is short, whatever its colours.
	if _, level, _, ok := split(Clean(raw[:min(len(raw), 128)])); ok {
		return level
	}
	if strings.HasPrefix(raw, " ") || strings.HasPrefix(raw, "\t") {
		return before // it goes on with it, as what nydusd says of FUSE does
	}
	return max(slog.LevelWarn, before)
}

// Parse reads a line of nydusd's log, or of whatever else wrote there: panics, the
// C library, the mount helper. before is as for Level, hide removes secrets.
func Parse(raw string, before slog.Level, hide *Hider) Line {
	l := Line{Level: Level(raw, before)}
	text := Clean(raw)
	if when, _, rest, ok := split(text); ok {
		l.Time, text = when, rest
	}
	l.Text = shorten(hide.Hide(text), maxText)
	return l
}

// split takes apart what nydusd writes: [time] LEVEL text.
func split(text string) (when string, level slog.Level, rest string, ok bool) {
	if !strings.HasPrefix(text, "[") {
		return "", 0, "", false
	}
	when, rest, _ = strings.Cut(text[1:], "] ")
	word, rest, _ := strings.Cut(rest, " ")
	level, ok = levelOf(word)
	return when, level, rest, ok && isTime(when)
}

// isTime tells whether s looks like "2024-05-06 07:08:09.123456 +00:00".
func isTime(s string) bool {
	return len(s) > 0 && len(s) <= 40 && strings.Trim(s, "0123456789-:.+TZ ") == ""
}

// levelOf maps nydusd's levels.
func levelOf(word string) (slog.Level, bool) {
	switch word {
	case "ERROR":
		return slog.LevelError, true
	case "WARN", "WARNING":
		return slog.LevelWarn, true
	case "INFO", "DEBUG", "TRACE":
		return slog.LevelDebug, true
	}
	return 0, false
}

// Clean makes text printable: colours go, other control characters, bytes that are
// no UTF-8 and characters that change how others show are written as escapes.
func Clean(raw string) string {
	var b strings.Builder
	for len(raw) > 0 {
		if n := colour(raw); n > 0 {
			raw = raw[n:]
			continue
		}
		r, n := utf8.DecodeRuneInString(raw)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, raw[0])
		case r == '\t':
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r < utf8.RuneSelf:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
		raw = raw[n:]
	}
	return b.String()
}

// colour returns the length of the terminal sequence that s begins with, or 0.
func colour(s string) int {
	if !strings.HasPrefix(s, "\x1b[") {
		return 0
	}
	for n := 2; n < len(s); n++ {
		switch c := s[n]; {
		case c >= 0x40 && c <= 0x7e:
			return n + 1
		case c < 0x20 || c > 0x7e:
			return 0
		}
	}
	return 0
}

// shorten cuts text to about limit bytes and says so.
func shorten(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return fmt.Sprintf("%s… (%d bytes more)", text[:cut], len(text)-cut)
}

// splitter makes lines of what is read in pieces.
type splitter struct {
	// rest is what has been read of a line that has not ended, over how many
	// bytes of it were dropped because it is too long.
	rest []byte
	over int
}

// feed calls line for each line that ends within data.
func (s *splitter) feed(data string, line func(string)) {
	for {
		head, tail, ended := strings.Cut(data, "\n")
		room := min(len(head), maxLine-len(s.rest))
		if !ended || len(s.rest) > 0 || room < len(head) {
			s.rest = append(s.rest, head[:room]...)
			s.over += len(head) - room
			head = ""
		}
		if !ended {
			return
		}
		if len(s.rest) > 0 {
			head = s.take()
		}
		line(head)
		data = tail
	}
}

// pending is how many bytes belong to the line that has not ended.
func (s *splitter) pending() int { return len(s.rest) + s.over }

// take ends the current line.
func (s *splitter) take() string {
	text := string(s.rest)
	if s.over > 0 {
		text += fmt.Sprintf("… (%d bytes more)", s.over)
	}
	s.rest, s.over = nil, 0
	return text
}
