package config

import "fmt"

// Download says which images are completed in the background.
type Download string

// Which images are completed in the background.
const (
	DownloadNever Download = "never"
	// DownloadIdle is for those that were mounted, while nobody reads what is not cached.
	DownloadIdle Download = "idle"
	// DownloadAlways is for all that are pulled.
	DownloadAlways Download = "always"
)

const (
	// minDownload is the least rate: less is a mistake.
	minDownload = 64 << 10
	// maxRate is more bytes a second than any network has.
	maxRate = 1 << 40
)

// ParseSize reads a number of bytes as it is written: "16M".
func ParseSize(text string) (Size, error) {
	n, ok := parseSize(text)
	if !ok {
		return 0, fmt.Errorf(`%q: want bytes as a whole number, with K, M or G behind it (of 1024) such as "16M"`, text)
	}
	return n, nil
}

func (v *validator) download(c Cache) {
	v.oneOf("cache.download", string(c.Download), string(DownloadNever), string(DownloadIdle), string(DownloadAlways))
	if r := c.DownloadRate; r != 0 && (r < minDownload || r > maxRate) {
		v.fail("cache.download_rate", "is %s, want 0 for no bound, or at least %s a second, and at most %s", r, Size(minDownload), Size(maxRate))
	}
}
