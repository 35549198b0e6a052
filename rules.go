package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"unicode"
)

// How a rule gets unharmed through a shell or systemd, as docs/names.md has it. Each was tried.
const (
	quotedInShell    = `--prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'`
	quotedInUnit     = `'--prefix={"regexp":"(.*)\\\\..*\\\\.(.*)\\\\..*","into":"$1.$2"}'`
	quotedAsVariable = `SRV_PREFIX='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'`
)

// misquoted says what is wrong with a rule of which a shell or systemd has removed something.
type misquoted string

func (m misquoted) Error() string { return string(m) }

// quoting says what to do about that, where a rule came from an option or a variable.
func quoting(from string) string {
	how := quotedInShell
	switch {
	case !strings.HasPrefix(from, "--"):
		how = quotedAsVariable
	case os.Getenv("INVOCATION_ID") != "": // of systemd
		how = quotedInUnit
	}
	return "put it in single quotes, as in " + how + ", or into a file: --prefix=@FILE"
}

const form = `the form is {"regexp":"…","into":"…"}, or a list of such: [{…},{…}]`

// parseRules reads the value of --prefix: a rule in JSON, a list of rules, or @ and the path of
// a file with them. An error is one line that says what is wrong and what to write instead.
func parseRules(text string) (rules, error) {
	source, err := openRules(text)
	if err != nil {
		return nil, err
	}
	rs, err := source.parse()
	if err != nil && source.file != "" {
		return nil, fmt.Errorf("%s: %w", source.file, err)
	}
	return rs, err
}

func (s ruleSource) parse() (rs rules, err error) {
	list, isList, err := s.split()
	if err != nil {
		return nil, err
	}
	for i, raw := range list {
		r, err := s.parseRule(raw)
		if err == nil {
			err = checkUse(rs, r, i == len(list)-1)
		}
		if err != nil && isList {
			err = fmt.Errorf("rule %d: %w", i+1, err)
		}
		if err != nil {
			return nil, err
		}
		rs = append(rs, r)
	}
	return rs, nil
}

// ruleSource is the text of rules, and the file it was read from, if any.
type ruleSource struct{ text, file string }

func openRules(text string) (ruleSource, error) {
	if path, ok := strings.CutPrefix(text, "@"); ok {
		body, err := readText(path)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, fileRemedy(err, "give @ and the path of a file"))
		}
		return ruleSource{body, path}, err
	}
	isJSON := strings.HasPrefix(text, "{") || strings.HasPrefix(text, "[")
	if !isJSON && strings.Contains(text, "://") {
		// --prefix without a value takes the next option for it.
		return ruleSource{}, fmt.Errorf("not a rule, and %s; %s", shown(text), form)
	}
	if info, err := os.Stat(text); err == nil && info.Mode().IsRegular() {
		return ruleSource{}, fmt.Errorf("not a rule, but the path of a file; "+
			"put an @ before it to read the rules from there: @%s", oneLine(text))
	}
	return ruleSource{text: text}, nil
}

// split returns the rules of the source as JSON, and whether they stand in a list.
func (s ruleSource) split() (list []json.RawMessage, isList bool, err error) {
	var all json.RawMessage
	if err := json.Unmarshal([]byte(s.text), &all); err != nil {
		return nil, false, s.explain(err)
	}
	if all[0] != '[' {
		return []json.RawMessage{all}, false, nil
	}
	json.Unmarshal(all, &list) // all is known to be JSON
	if len(list) == 0 {
		return nil, true, errors.New("the list has no rule in it; " + form)
	}
	return list, true, nil
}

// at describes the place of a byte of the source, counted from 1.
func (s ruleSource) at(offset int) string {
	if s.file == "" {
		return fmt.Sprintf("byte %d of %s", offset, oneLine(s.text))
	}
	before := s.text[:min(max(offset-1, 0), len(s.text))]
	line, column := strings.Count(before, "\n")+1, len(before)-strings.LastIndex(before, "\n")
	return fmt.Sprintf("line %d, column %d", line, column)
}

// backslash says that there is one too few, which only a file keeps as it is.
func (s ruleSource) backslash(format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	if s.file != "" {
		return errors.New(what + ": in JSON, write each of them twice")
	}
	return misquoted(what + ": a shell or systemd removed the other one, or it was never there")
}

// explain says what to do about an error of encoding/json.
func (s ruleSource) explain(err error) error {
	var wrong *json.SyntaxError
	errors.As(err, &wrong) // a json.RawMessage has no other error
	at := s.at(int(wrong.Offset))
	unquoted := !strings.Contains(s.text, `"`) && strings.ContainsAny(s.text, "{:")
	switch {
	case s.text == "":
		return errors.New("empty; " + form)
	case s.file == "" && unquoted:
		return misquoted(fmt.Sprintf("it arrived without its double quotes, as %s: "+
			"a shell or systemd removed them", oneLine(s.text)))
	case strings.Contains(err.Error(), "in string escape code"):
		return s.backslash(`there is a single backslash before %s, `+
			`and the \. of a regexp is \\. in JSON`, at)
	case strings.Contains(err.Error(), "after top-level value"):
		return fmt.Errorf("something follows the JSON, at %s; leave only the rule or the list", at)
	case strings.Contains(err.Error(), "unexpected end"):
		return fmt.Errorf("the JSON ends too early, at %s; %s", at, form)
	}
	return fmt.Errorf("not JSON, at %s: %w; %s", at, err, form)
}

func (s ruleSource) parseRule(raw json.RawMessage) (r rule, err error) {
	var given struct {
		Regexp   *string `json:"regexp"`
		Into     *string `json:"into"`
		From     *string `json:"from"`
		Category string  `json:"category"`
		Drop     bool    `json:"drop"`
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	err = decoder.Decode(&given)
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &kind) && kind.Field != "":
		const wrong = "%q is a JSON %s instead of a %s; %s"
		return r, fmt.Errorf(wrong, kind.Field, kind.Value, kind.Type, form)
	case kind != nil:
		return r, fmt.Errorf("a JSON %s instead of an object; %s", kind.Value, form)
	case err != nil:
		return r, fmt.Errorf("%s; the keys are regexp, into, from, category, drop",
			strings.TrimPrefix(err.Error(), "json: "))
	case given.Regexp == nil:
		return r, errors.New(`the key "regexp" is missing; ` + form)
	}
	r = rule{from: "name", category: given.Category, drop: given.Drop}
	if given.From != nil {
		r.from = *given.From
	}
	if given.Into != nil {
		r.rename, r.into = true, *given.Into
	}
	for _, text := range []string{*given.Regexp, r.into, r.from, r.category} {
		// In JSON, \b is a backspace and \t a tab. Neither a name nor a regexp has these.
		if strings.ContainsFunc(text, unicode.IsControl) {
			return r, s.backslash("there is a single backslash, "+
				"which JSON takes for a control character, in %s", oneLine(string(raw)))
		}
	}
	err = compileRule(&r, *given.Regexp)
	return r, err
}

func compileRule(r *rule, pattern string) (err error) {
	if err := checkFrom(r); err != nil {
		return err
	}
	if r.regexp, err = regexp.Compile(pattern); err != nil {
		return fmt.Errorf(`in "regexp": %s; the syntax is that of https://pkg.go.dev/regexp/syntax`,
			strings.TrimPrefix(oneLine(err.Error()), "error parsing regexp: "))
	}
	if err := checkTemplate(r.into, r.regexp); err != nil {
		return err
	}
	if isEmptied(r, pattern) {
		return misquoted(fmt.Sprintf(`"into" is only %q, and no group is in it: `+
			"a shell removed those, such as $1, if the rule was in double quotes", r.into))
	}
	if r.category == "" {
		return nil
	}
	r.category = graphiteNode(r.category)
	switch r.category {
	case "total", "running", "paused", "stopped":
		return fmt.Errorf("the category %q is taken: "+
			"<host>.containers.%[1]s is another figure; choose another name", r.category)
	case "max", "min", "count":
		return fmt.Errorf("no category can be called %q: Carbon aggregates metrics "+
			"with such an ending differently; choose another name", r.category)
	}
	return nil
}

// isEmptied reports whether nothing of a name would be left, though r has groups: a shell takes $1
// for a variable of its own.
func isEmptied(r *rule, pattern string) bool {
	if !r.rename || r.regexp.NumSubexp() == 0 || strings.Trim(r.into, "._-") != "" {
		return false
	}
	bare := strings.Trim(pattern, "^$")
	takesAll := strings.HasPrefix(bare, "(.*)") || strings.HasPrefix(bare, "(.+)")
	return takesAll && (r.into != "" || len(bare) == len("(.*)"))
}

func checkFrom(r *rule) error {
	key, isLabel := strings.CutPrefix(r.from, "label:")
	switch {
	case isLabel && key != "", r.from == "name", r.from == "image", r.from == "id":
		return nil
	case isLabel || r.from == "label":
		return errors.New(`"from" names no label: ` +
			`write "label:" and its key, such as "label:com.docker.compose.project"`)
	}
	const wrong = `"from" is %q; write "name", "image", "id", or "label:" and a label's key`
	return fmt.Errorf(wrong, r.from)
}

// checkUse refuses a rule that has no effect after the rules rs.
func checkUse(rs rules, r rule, last bool) error {
	switch {
	case r.drop && (r.rename || r.category != ""):
		return errors.New(`"drop" leaves the container out altogether, ` +
			`so "into" and "category" have no effect; leave them out`)
	case last && !r.drop && !r.rename && r.category == "":
		return errors.New(`it has no effect, as no rule follows it; ` +
			`give it an "into", a "category" or a "drop", or leave it out`)
	}
	for i, before := range rs {
		// With a label in its "into", it does not match a container without that.
		isSame := before.from == r.from && before.regexp.String() == r.regexp.String()
		if isSame && !strings.Contains(before.into, "${label:") {
			return fmt.Errorf("it can never be reached: "+
				"rule %d has the same regexp; put them together", i+1)
		}
	}
	return nil
}

// checkTemplate refuses a template with a group that re does not have: Expand would silently put
// nothing in its place.
func checkTemplate(template string, re *regexp.Regexp) error {
	for i := 0; i < len(template); {
		if template[i] != '$' {
			i++
			continue
		}
		group, length := templateRef(template[i:])
		if length == 0 { // Expand leaves such a "$" as it is
			return fmt.Errorf(`in "into": the $ at byte %d of %s names no group; `+
				`write $$ for a dollar sign`, i+1, template)
		}
		isOwn := group == "" || group == "host" || strings.HasPrefix(group, "label:")
		if !isOwn && !hasGroup(re, group) {
			remedy := fmt.Sprintf("it has %d, one for each pair of parentheses", re.NumSubexp())
			if strings.EqualFold(group, "hostname") || strings.EqualFold(group, "host") {
				remedy = "the host's name is ${host}"
			} else if braced, rest := splitGroup(re, group); braced != "" && template[i+1] != '{' {
				remedy = fmt.Sprintf("write ${%s}%s, since a group's name goes on "+
					"as long as there are letters, digits and underscores", braced, rest)
			}
			return fmt.Errorf(`in "into": %s names the group %q, `+
				`which the regexp does not have; %s`, template[i:i+length], group, remedy)
		}
		i += length
	}
	return nil
}

// splitGroup returns the longest start of group that is a group of re, and the rest.
func splitGroup(re *regexp.Regexp, group string) (found, rest string) {
	for end := len(group) - 1; end > 0; end-- {
		if hasGroup(re, group[:end]) || group[:end] == "host" {
			return group[:end], group[end:]
		}
	}
	return "", group
}
