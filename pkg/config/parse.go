package config

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// MaxSize bounds a configuration file in bytes.
const MaxSize = 1 << 20

// Overrides are values from the command line by dotted key, for keys that take
// a text.
type Overrides map[string]string

// Parse returns the configuration in text, over the defaults and under the
// overrides. The name is for messages only. The error is an *Error with every
// fault.
func Parse(name string, text []byte, overrides Overrides) (Config, error) {
	p := parser{config: Default()}
	if len(text) > MaxSize {
		p.fail("", "%d bytes are more than the limit of %d", len(text), MaxSize)
		return Config{}, p.error(name)
	}
	var tree map[string]any
	if err := toml.Unmarshal(text, &tree); err != nil {
		p.faults = append(p.faults, syntaxFault(err))
		return Config{}, p.error(name)
	}
	p.lines = lines(text)
	if _, ok := tree["version"]; !ok {
		p.fail("version", "is missing; begin the file with version = %d", Version)
	}
	p.table("", tree, reflect.ValueOf(&p.config).Elem())
	return p.finish(name, overrides)
}

// FromDefaults returns the defaults under the overrides, for when there is no
// file.
func FromDefaults(overrides Overrides) (Config, error) {
	p := parser{config: Default()}
	return p.finish("from the command line", overrides)
}

// finish applies overrides and validates what could be read: a key that is
// already known to be wrong holds its default and is not reported twice.
func (p *parser) finish(name string, overrides Overrides) (Config, error) {
	for key, value := range overrides {
		delete(p.lines, key)
		p.override(key, value)
	}
	for _, f := range p.config.Validate() {
		p.fail(f.Key, "%s", f.Problem)
	}
	if len(p.faults) > 0 {
		return Config{}, p.error(name)
	}
	return p.config, nil
}

func syntaxFault(err error) Fault {
	var d *toml.DecodeError
	if errors.As(err, &d) {
		line, _ := d.Position()
		return Fault{Line: line, Problem: strings.TrimPrefix(d.Error(), "toml: ")}
	}
	return Fault{Problem: strings.TrimPrefix(err.Error(), "toml: ")}
}

type parser struct {
	config Config
	lines  map[string]int
	faults []Fault
}

func (p *parser) fail(key, format string, args ...any) {
	p.faults = append(p.faults, Fault{Key: key, Line: p.lines[key], Problem: fmt.Sprintf(format, args...)})
}

func (p *parser) error(name string) *Error {
	slices.SortStableFunc(p.faults, func(a, b Fault) int {
		if a.Line != b.Line && a.Line*b.Line == 0 {
			return b.Line - a.Line // without a line: last
		}
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return strings.Compare(a.Key, b.Key)
	})
	return &Error{Name: name, Faults: p.faults}
}

// table assigns the members of a TOML table to the fields of a struct.
func (p *parser) table(prefix string, tree map[string]any, into reflect.Value) {
	for name, value := range tree {
		key := join(prefix, name)
		field, ok := fieldOf(into, name)
		if !ok {
			p.fail(key, "unknown key%s", suggestion(into.Type(), name))
			continue
		}
		switch {
		case isTables(field):
			p.tables(key, value, field)
			continue
		case field.Kind() != reflect.Struct:
			p.assign(key, value, field)
			continue
		}
		if sub, ok := value.(map[string]any); ok {
			p.table(key, sub, field)
		} else {
			p.fail(key, "want a table, got %s", kindOf(value))
		}
	}
}

// tables assigns a list of TOML tables to a slice of structs.
func (p *parser) tables(key string, value any, into reflect.Value) {
	list, ok := value.([]any)
	if !ok {
		p.fail(key, "want a list of tables, each begun with [[%s]], got %s", key, kindOf(value))
		return
	}
	all := reflect.MakeSlice(into.Type(), len(list), len(list))
	for i, v := range list {
		if sub, ok := v.(map[string]any); ok {
			p.table(elementKey(key, i), sub, all.Index(i))
		} else {
			p.fail(key, "want a list of tables, element %d is %s", i, kindOf(v))
		}
	}
	into.Set(all)
}

func isTables(v reflect.Value) bool {
	return v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct
}

// elementKey is the key of an element of a list of tables. People count from 1.
func elementKey(key string, i int) string { return fmt.Sprintf("%s[%d]", key, i+1) }

// assign sets one field from one TOML value, or says why it cannot.
func (p *parser) assign(key string, value any, into reflect.Value) {
	switch {
	case into.Type() == reflect.TypeFor[time.Duration]():
		text, ok := value.(string)
		if !ok {
			p.fail(key, `want a duration as text, such as "30s", got %s`, kindOf(value))
			return
		}
		d, err := time.ParseDuration(text)
		if err != nil {
			p.fail(key, `%q is no duration; write it as "500ms", "30s" or "5m"`, text)
			return
		}
		into.SetInt(int64(d))
	case into.Type() == reflect.TypeFor[Size]():
		text, ok := value.(string)
		if !ok {
			p.fail(key, `want a size as text, such as "16M", got %s`, kindOf(value))
			return
		}
		size, ok := parseSize(text)
		if !ok {
			p.fail(key, `%q is no size; write it as "512K", "16M" or "1G"`, text)
			return
		}
		into.SetInt(int64(size))
	case into.Kind() == reflect.String:
		text, ok := value.(string)
		if !ok {
			p.fail(key, "want text, got %s", kindOf(value))
			return
		}
		into.SetString(text)
	case into.Kind() == reflect.Bool:
		set, ok := value.(bool)
		if !ok {
			p.fail(key, "want true or false, got %s", kindOf(value))
			return
		}
		into.SetBool(set)
	case into.Kind() == reflect.Int:
		n, ok := value.(int64)
		if !ok || n < math.MinInt32 || n > math.MaxInt32 {
			p.fail(key, "want a whole number of at most 32 bits, got %s", kindOf(value))
			return
		}
		into.SetInt(n)
	case into.Type() == reflect.TypeFor[[]string]():
		p.assignList(key, value, into)
	default:
		panic("config: field of unsupported type " + into.Type().String())
	}
}

func (p *parser) assignList(key string, value any, into reflect.Value) {
	list, ok := value.([]any)
	if !ok {
		p.fail(key, "want a list of texts, got %s", kindOf(value))
		return
	}
	texts := make([]string, 0, len(list))
	for i, v := range list {
		text, ok := v.(string)
		if !ok {
			p.fail(key, "want a list of texts, element %d is %s", i, kindOf(v))
			return
		}
		texts = append(texts, text)
	}
	into.Set(reflect.ValueOf(texts))
}

func (p *parser) override(key, value string) {
	into := reflect.ValueOf(&p.config).Elem()
	for _, name := range strings.Split(key, ".") {
		field, ok := fieldOf(into, name)
		if !ok {
			p.fail(key, "unknown key")
			return
		}
		into = field
	}
	p.assign(key, value, into)
}

// fieldOf finds a struct's field by its TOML name.
func fieldOf(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("toml") == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// suggestion helps with keys of another case or with - in place of _.
func suggestion(t reflect.Type, name string) string {
	plain := strings.ReplaceAll(strings.ToLower(name), "-", "_")
	for i := range t.NumField() {
		if tag := t.Field(i).Tag.Get("toml"); tag == plain {
			return fmt.Sprintf("; did you mean %s?", tag)
		}
	}
	return ""
}

func kindOf(value any) string {
	switch v := value.(type) {
	case string:
		return "text"
	case int64:
		return fmt.Sprintf("the number %d", v)
	case float64:
		return "a fraction"
	case bool:
		return "true or false"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	default:
		return "a date or time"
	}
}

func join(prefix, name string) string {
	if prefix == "" {
		return name
	}
	return prefix + "." + name
}

// lines tells for each key and table of a well-formed document the line where
// it is first mentioned. Elements of lists of tables have elementKey.
func lines(text []byte) map[string]int {
	f := finder{at: map[string]int{}, elements: map[string]int{}}
	f.p.Reset(text)
	table := ""
	for f.p.NextExpression() {
		switch e := f.p.Expression(); e.Kind {
		case unstable.Table:
			table = f.header(e.Key())
		case unstable.ArrayTable:
			name := f.header(e.Key())
			if i := strings.LastIndexByte(name, '['); i > 0 && f.elements[name[:i]] > 0 {
				name = name[:i] // the element before
			}
			table = elementKey(name, f.elements[name])
			f.elements[name]++
			key, last := e.Key(), (*unstable.Node)(nil)
			for key.Next() {
				last = key.Node()
			}
			f.note(table, last)
		case unstable.KeyValue:
			f.value(table, e)
		}
	}
	return f.at
}

// finder finds lines.
type finder struct {
	p  unstable.Parser
	at map[string]int
	// elements counts those of lists of tables.
	elements map[string]int
}

func (f *finder) note(key string, n *unstable.Node) {
	if f.at[key] == 0 {
		f.at[key] = f.p.Shape(n.Raw).Start.Line
	}
}

// header notes each step of a table's name, which goes through the last element of a
// list, and returns the whole.
func (f *finder) header(key unstable.Iterator) (name string) {
	for key.Next() {
		name = join(name, string(key.Node().Data))
		f.note(name, key.Node())
		if n := f.elements[name]; n > 0 {
			name = elementKey(name, n-1)
		}
	}
	return name
}

// value notes a key, each step of it, and what lies in its value.
func (f *finder) value(prefix string, kv *unstable.Node) {
	key := kv.Key()
	for key.Next() {
		prefix = join(prefix, string(key.Node().Data))
		f.note(prefix, key.Node())
	}
	f.members(prefix, kv.Value())
}

func (f *finder) members(prefix string, value *unstable.Node) {
	children := value.Children()
	switch value.Kind {
	case unstable.InlineTable:
		for children.Next() {
			f.value(prefix, children.Node())
		}
	case unstable.Array:
		for i := 0; children.Next(); i++ {
			f.members(elementKey(prefix, i), children.Node())
		}
	}
}
