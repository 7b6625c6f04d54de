package kit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// FindSecret looks for a secret where others can read it: in the arguments and
// environment of every process of the namespace but the program itself, in the
// mount table, and in the files below roots. Each find tells place and, for a
// file, its mode. Files of mode 0600 are found too: it is for the test to say which may hold it.
func FindSecret(secret string, roots ...string) ([]string, error) {
	needle := []byte(secret)
	var found []string
	procs, err := Processes()
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		for _, name := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID, name))
			if err == nil && bytes.Contains(text, needle) {
				found = append(found, fmt.Sprintf("%s of %s", name, p))
			}
		}
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	if bytes.Contains(text, needle) {
		found = append(found, "mountinfo")
	}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if path != root && errors.Is(err, fs.ErrNotExist) {
				return nil // it has just gone
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if bytes.Contains(text, needle) {
				info, err := d.Info()
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				if info == nil {
					return nil
				}
				found = append(found, fmt.Sprintf("%s (mode %04o)", path, info.Mode().Perm()))
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("find secret: %w", err)
		}
	}
	return found, nil
}
