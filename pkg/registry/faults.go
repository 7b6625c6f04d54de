package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"github.com/containerd/log"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
)

// userinfo is what a URL has of a user and a password.
var userinfo = regexp.MustCompile(`://[^/\s"]*@`)

// located adds the line to an error: where the text is no TOML, or that of the value
// which the error is about.
func located(file string, err error) error {
	at := file
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		line, column := decode.Position()
		at = fmt.Sprintf("%s:%d:%d", file, line, column)
	} else if text, failed := os.ReadFile(file); failed == nil {
		if line := lineAbout(string(text), err.Error()); line > 0 {
			at = fmt.Sprintf("%s:%d", file, line)
		}
	}
	return fmt.Errorf("%s: %w", at, withoutUserinfo(err))
}

// lineAbout finds the one line of a hosts.toml with a value that an error names, and
// otherwise the one with a key that it names; 0 when there is none or more than one.
// containerd says what is wrong with a value, but not where it stands.
func lineAbout(text, fault string) int {
	words := strings.FieldsFunc(fault, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune("\"'`,:[](){}", r) })
	for _, form := range []string{`["']([^"':]*/)?%s["']`, `^\s*["']?%s["']?\s*=`} {
		found := 0
		for _, word := range words {
			is := regexp.MustCompile(fmt.Sprintf(form, regexp.QuoteMeta(filepath.Base(word))))
			for i, line := range strings.Split(text, "\n") {
				switch {
				case !is.MatchString(line) || found == i+1:
				case found > 0:
					return 0
				default:
					found = i + 1
				}
			}
		}
		if found > 0 {
			return found
		}
	}
	return 0
}

// withoutUserinfo cuts users and passwords out of an error's URLs.
func withoutUserinfo(err error) error {
	if text := err.Error(); userinfo.MatchString(text) {
		return errors.New(userinfo.ReplaceAllString(text, "://"))
	}
	return err
}

// faults collects errors that are logged, and keeps them from any log.
type faults struct{ err error }

// collect returns a context whose log is collected.
func (f *faults) collect(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(f)
	return log.WithLogger(context.WithoutCancel(ctx), logrus.NewEntry(logger))
}

// Levels implements logrus.Hook.
func (*faults) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (f *faults) Fire(entry *logrus.Entry) error {
	err, isError := entry.Data[logrus.ErrorKey].(error)
	if !isError {
		err = errors.New(entry.Message)
	}
	f.err = errors.Join(f.err, err)
	return nil
}

// silent returns a context in which containerd logs nothing: what it would tell are
// the answers of token servers, and addresses with signatures.
func silent(ctx context.Context) context.Context {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(logger))
}
