package config

import (
	"strings"
	"testing"
)

func TestSignatureNeedsKeys(t *testing.T) {
	for _, c := range []struct {
		image Image
		fault string
	}{
		{Image{}, ""},
		{Image{true, "/etc/keys.pem"}, ""},
		{Image{false, "/etc/keys.pem"}, ""},
		{Image{true, ""}, "image.validate_signature"},
		{Image{true, "keys.pem"}, "absolute path"},
		{Image{false, "/etc/../keys.pem"}, "absolute path"},
	} {
		cfg := Default()
		cfg.Image = c.image
		faults := cfg.Validate()
		if (len(faults) == 0) != (c.fault == "") || len(faults) > 0 && (faults[0].Key != "image.public_key_file" || !strings.Contains(faults[0].Problem, c.fault)) {
			t.Errorf("%+v: %v, want %q", c.image, faults, c.fault)
		}
	}
}
