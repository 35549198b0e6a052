package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode"
)

// rule is what --prefix says: how the name of a container becomes the path of its
// metrics. The zero rule leaves every name as it is.
type rule struct {
	regexp *regexp.Regexp
	into   string // in the notation of regexp.Regexp.Expand
}

// How to get a --prefix unharmed through whatever stands between the user and us. Each
// form was tried on what it names; the README shows them too.
const quoting = `put the whole of it in single quotes; ` +
	`in a shell: --prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'; ` +
	`in a systemd unit, with the backslashes doubled again: '--prefix={"regexp":"(.*)\\\\..*\\\\.(.*)\\\\..*","into":"$1.$2"}'; ` +
	`in a systemd EnvironmentFile: SRV_PREFIX='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'`

// form is the remedy where nothing more exact can be said.
const form = `the form is {"regexp":"…","into":"…"}`

// parseRule reads the JSON object {"regexp":…,"into":…}. Its errors are one line
// that says what is wrong and how to mend it.
func parseRule(text string) (rule, error) {
	var keys struct {
		Regexp *string `json:"regexp"`
		Into   *string `json:"into"`
	}
	if strings.Contains(text, "://") { // such as the next option, for want of a value
		return rule{}, fmt.Errorf("not a rule, and %s; %s", shown(text), form)
	}
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&keys)
	if err == nil {
		// One value, and nothing behind it.
		if _, more := decoder.Token(); more != io.EOF {
			return rule{}, fmt.Errorf("something follows the JSON object, at byte %d of %s; leave only the object", decoder.InputOffset()+1, oneLine(text))
		}
	}
	if err != nil {
		return rule{}, explainJSON(oneLine(text), err)
	}
	// encoding/json takes "Regexp" for "regexp" as well, which is harmless.
	if keys.Regexp == nil {
		return rule{}, errors.New(`the key "regexp" is missing; ` + form)
	}
	if keys.Into == nil {
		return rule{}, errors.New(`the key "into" is missing; ` + form)
	}
	// In JSON, \b is a backspace and \t a tab, which no container's name has.
	if i := strings.IndexFunc(*keys.Regexp+*keys.Into, unicode.IsControl); i >= 0 {
		return rule{}, fmt.Errorf("it arrived with a single backslash, which JSON takes for a control character, in %s; %s", oneLine(text), quoting)
	}
	re, err := regexp.Compile(*keys.Regexp)
	if err != nil {
		return rule{}, fmt.Errorf("%s; the syntax is that of https://pkg.go.dev/regexp/syntax", oneLine(err.Error()))
	}
	if err := checkTemplate(*keys.Into, re); err != nil {
		return rule{}, err
	}
	return rule{re, *keys.Into}, nil
}

// explainJSON turns an error of encoding/json into what its reader has to do.
func explainJSON(text string, err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case !strings.Contains(text, `"`) && strings.ContainsAny(text, "{:"):
		return fmt.Errorf("it arrived without its double quotes, as %s: systemd or a shell took them out; %s", text, quoting)
	case errors.As(err, &syntax) && strings.Contains(err.Error(), "in string escape code"):
		return fmt.Errorf(`it arrived with a single backslash, before byte %d of %s: systemd or a shell took the other one out, or it was never there (the \. of a regexp is \\. in JSON); %s`, syntax.Offset, text, quoting)
	case errors.As(err, &syntax):
		return fmt.Errorf("not JSON, at byte %d of %s: %w; %s", syntax.Offset, text, err, form)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("the JSON ends too early: %s; %s", text, form)
	case errors.As(err, &kind) && kind.Field == "":
		return fmt.Errorf("a JSON %s where an object is wanted; %s", kind.Value, form)
	case errors.As(err, &kind):
		return fmt.Errorf("%q is a JSON %s where a string is wanted; %s", kind.Field, kind.Value, form)
	default: // an unknown key: encoding/json has no type for that
		return fmt.Errorf(`%s; the keys are "regexp" and "into"`, strings.TrimPrefix(err.Error(), "json: "))
	}
}

// checkTemplate refuses a template that names a group re does not have: Expand would
// silently put nothing in its place.
func checkTemplate(template string, re *regexp.Regexp) error {
	for i := 0; i < len(template); {
		if template[i] != '$' {
			i++
			continue
		}
		group, length := templateGroup(template[i:])
		if length == 0 { // a "$" that Expand leaves as it is
			return fmt.Errorf(`in "into": the $ at byte %d of %s names no group; write $$ for a dollar sign`, i+1, template)
		}
		if group != "" && !hasGroup(re, group) {
			remedy := fmt.Sprintf("the regexp has %s", groups(re))
			if braced, rest := splitGroup(re, group); braced != "" && template[i+1] != '{' {
				remedy = fmt.Sprintf("write ${%s}%s, since a group's name goes on as long as there are letters, digits and underscores", braced, rest)
			}
			return fmt.Errorf(`in "into": %s names the group %q, which the regexp does not have; %s`, template[i:i+length], group, remedy)
		}
		i += length
	}
	return nil
}

// What Expand takes for a reference.
var templateRef = regexp.MustCompile(`^\$(?:\$|([\pL\p{Nd}_]+)|\{([\pL\p{Nd}_]+)\})`)

// templateGroup returns the name of the group that a template starting with "$" refers
// to ("" for "$$"), and the length of that reference; 0 where it is none.
func templateGroup(template string) (group string, length int) {
	m := templateRef.FindStringSubmatch(template)
	if m == nil {
		return "", 0
	}
	return m[1] + m[2], len(m[0])
}

func hasGroup(re *regexp.Regexp, group string) bool {
	// As Expand does, which takes $01 for a group named "01".
	if n, err := strconv.Atoi(group); err == nil && strconv.Itoa(n) == group {
		return n <= re.NumSubexp()
	}
	return re.SubexpIndex(group) >= 0
}

// splitGroup returns the longest start of group that is a group of re, and what is left.
func splitGroup(re *regexp.Regexp, group string) (found, rest string) {
	for end := len(group) - 1; end > 0; end-- {
		if hasGroup(re, group[:end]) {
			return group[:end], group[end:]
		}
	}
	return "", group
}

// groups says which groups re has.
func groups(re *regexp.Regexp) string {
	switch n := re.NumSubexp(); n {
	case 0:
		return "no groups (those are its parentheses)"
	case 1:
		return "one group, $1"
	default:
		return fmt.Sprintf("%d groups, $1 to $%d", n, n)
	}
}

// path returns the Graphite path for the metrics of the container with that name,
// which is given without Docker's leading slash.
func (r rule) path(name string) string {
	if r.regexp != nil {
		if path := graphitePath(r.regexp.ReplaceAllString(name, r.into)); path != "" {
			return path
		}
	}
	if path := graphitePath(name); path != "" {
		return path
	}
	return "_" // no engine has such a name; if one had, this keeps the metrics' own names whole
}

// Lengths in bytes. Carbon makes a folder of each node, and a file name holds no more on any
// common file system; and it hangs up on whoever sends a line of over 16,384 bytes.
const (
	maxNode = 255
	maxPath = 1024
)

// graphitePath makes name a path that is safe on the wire and in Graphite: nodes of
// [A-Za-z0-9_-] between single dots. Every other character becomes "_"; empty nodes go.
// Neither Backstop nor Carbon checks a name, and a newline, say, would start a second
// metric of the name's own choosing.
func graphitePath(name string) string {
	nodes := strings.FieldsFunc(name, func(r rune) bool { return r == '.' })
	for i, node := range nodes {
		nodes[i] = graphiteNode(node)
	}
	path := strings.Join(nodes, ".")
	return strings.TrimSuffix(path[:min(len(path), maxPath)], ".")
}

// isGraphitePath tells whether name is what graphitePath makes, with or without a metric's own name
// behind it.
func isGraphitePath(name string) bool {
	for node := range strings.SplitSeq(name, ".") {
		if node == "" || graphiteNode(node) != node {
			return false
		}
	}
	return len(name) <= 2*maxPath
}

// graphiteNode makes name one single node of a Graphite path.
func graphiteNode(name string) string {
	node := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-':
			return r
		default:
			return '_'
		}
	}, name)
	return node[:min(len(node), maxNode)]
}
