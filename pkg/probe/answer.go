package probe

import "golang.org/x/sys/unix"

// answer turns what the child wrote into an error.
func answer(code int) error {
	switch {
	case code == 0:
		return nil
	case code == notMounted:
		return ErrGone
	}
	return unix.Errno(code)
}
