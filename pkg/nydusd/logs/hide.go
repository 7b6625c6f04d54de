package logs

import (
	"encoding/base64"
	"regexp"
	"slices"
	"strings"
)

// hidden is what is shown of a secret.
const hidden = "[hidden]"

// minSecret is how long a secret must be to be looked for by itself: shorter ones
// occur in ordinary text.
const minSecret = 6

// Hider removes credentials from text: those it is given wherever they stand, and
// what looks like one: a URL's user and query (a token server's password, a signed
// request), a basic or bearer authorization, a signed one, the value of a setting that is named
// like a secret. It errs on the side of hiding.
type Hider struct {
	known                    []string
	url, scheme, assign, oss *regexp.Regexp
}

// NewHider returns a Hider that knows these secrets.
func NewHider(known ...string) *Hider {
	h := &Hider{
		url:    regexp.MustCompile(`(?i)\b([a-z][a-z0-9+.-]*://)([^\s/?#"'<>]*@)?([^\s?"'<>]*)(\?[^\s"'<>]*)?`),
		scheme: regexp.MustCompile(`(?i)\b(basic|bearer)\s+([A-Za-z0-9+/=._~-]{4,})`),
		assign: regexp.MustCompile(`(?i)((?:\b[a-z0-9_-]*(?:password|passwd|secret|token|signature|credentials?|access_key_id)|\b(?:registry_|proxy-)?auth(?:orization)?)\\*["']?\s*[=:]\s*(?:Some\()?)` +
			`(\\*"[^"]*"?|'[^']*'?|[^\s,;&"')}\]]+)`),
		// An access key's id and a signature: of HMAC-SHA1, in base64.
		oss: regexp.MustCompile(`\b(OSS )[A-Za-z0-9._-]+:[A-Za-z0-9+/]{27}=`),
	}
	h.Know(known...)
	return h
}

// Know replaces the secrets that it is given.
func (h *Hider) Know(known ...string) {
	h.known = h.known[:0]
	for _, s := range known {
		if len(s) >= minSecret {
			h.known = append(h.known, s)
		}
	}
	// One may be a part of another.
	slices.SortFunc(h.known, func(a, b string) int { return len(b) - len(a) })
}

// Hide returns text without credentials.
func (h *Hider) Hide(text string) string {
	for _, s := range h.known {
		text = strings.ReplaceAll(text, s, hidden)
	}
	if strings.Contains(text, "://") {
		text = h.url.ReplaceAllStringFunc(text, h.hideURL)
	}
	text = h.scheme.ReplaceAllStringFunc(text, h.hideScheme)
	text = h.oss.ReplaceAllString(text, "${1}"+hidden)
	return h.assign.ReplaceAllStringFunc(text, h.hideAssign)
}

func (h *Hider) hideURL(url string) string {
	m := h.url.FindStringSubmatch(url)
	if m[2] != "" {
		m[2] = hidden + "@"
	}
	if m[4] != "" {
		m[4] = "?" + hidden
	}
	return m[1] + m[2] + m[3] + m[4]
}

// hideScheme leaves words alone, as in "basic authentication".
func (h *Hider) hideScheme(text string) string {
	m := h.scheme.FindStringSubmatch(text)
	if strings.EqualFold(m[1], "bearer") {
		if len(m[2]) < 16 {
			return text
		}
	} else if pair, err := base64.StdEncoding.DecodeString(m[2]); err != nil || !strings.Contains(string(pair), ":") {
		return text
	}
	return strings.TrimSuffix(text, m[2]) + hidden
}

func (h *Hider) hideAssign(text string) string {
	m := h.assign.FindStringSubmatch(text)
	switch strings.Trim(m[2], `\"'`) {
	case "", "None", "null", hidden[:len(hidden)-1]:
		return text
	}
	return m[1] + hidden
}
