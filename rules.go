package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode"
)

// quoting shows how to get a rule unharmed through a shell or systemd, as docs/names.md does.
// Each form was tried.
const quoting = `put the whole of it in single quotes; ` +
	`in a shell: --prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'; ` +
	`in a systemd unit, with the backslashes doubled again: ` +
	`'--prefix={"regexp":"(.*)\\\\..*\\\\.(.*)\\\\..*","into":"$1.$2"}'; ` +
	`in a systemd EnvironmentFile: ` +
	`SRV_PREFIX='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'; ` +
	`or put it into a file: --prefix=@/etc/docker-stats-to-backstop.json`

// form is the remedy of errors that have no better one.
const form = `the form is {"regexp":"…","into":"…"}, or a list of such: [{…},{…}]`

// parseRules reads the value of --prefix: a rule in JSON, a list of rules, or @ and the path of
// a file with them. An error is one line that says what is wrong and what to write instead.
func parseRules(text string) (rules, error) {
	source, err := openRules(text)
	if err != nil {
		return nil, err
	}
	list, isList, err := source.split()
	if err != nil {
		return nil, source.in(err)
	}
	var rs rules
	for i, raw := range list {
		r, err := source.parseRule(raw)
		if err == nil {
			err = checkUse(rs, r, i == len(list)-1)
		}
		if err != nil && isList {
			err = fmt.Errorf("rule %d: %w", i+1, err)
		}
		if err != nil {
			return nil, source.in(err)
		}
		rs = append(rs, r)
	}
	return rs, nil
}

// ruleSource is the text of rules, and the file it was read from, if any.
type ruleSource struct{ text, file string }

// openRules returns text as a source, or the file that it names.
func openRules(text string) (ruleSource, error) {
	if path, ok := strings.CutPrefix(text, "@"); ok {
		body, err := readText(path)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, fileRemedy(err, "give @ and the path of a file"))
		}
		return ruleSource{body, path}, err
	}
	if strings.HasPrefix(text, "{") || strings.HasPrefix(text, "[") {
		return ruleSource{text: text}, nil
	}
	if strings.Contains(text, "://") {
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
	switch all[0] {
	case '{':
		return []json.RawMessage{all}, false, nil
	case '[':
		json.Unmarshal(all, &list) // all is known to be JSON
		if len(list) == 0 {
			return nil, true, errors.New("the list has no rule in it; " + form)
		}
		return list, true, nil
	}
	const wrong = "a JSON %s instead of an object or a list; %s"
	return nil, false, fmt.Errorf(wrong, kindOf(all), form)
}

// in puts the name of the file before an error.
func (s ruleSource) in(err error) error {
	if s.file == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.file, err)
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

// remedy says how to keep backslashes.
func (s ruleSource) remedy() string {
	if s.file == "" {
		return "systemd or a shell removed it, or it was never there; " + quoting
	}
	return "in JSON, write each of them twice"
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
		return fmt.Errorf("it arrived without its double quotes, as %s: "+
			"systemd or a shell removed them; %s", oneLine(s.text), quoting)
	case strings.Contains(err.Error(), "in string escape code"):
		return fmt.Errorf(`there is a single backslash before %s, `+
			`and the \. of a regexp is \\. in JSON: %s`, at, s.remedy())
	case strings.Contains(err.Error(), "after top-level value"):
		return fmt.Errorf("something follows the JSON, at %s; leave only the rule or the list", at)
	case strings.Contains(err.Error(), "unexpected end"):
		return fmt.Errorf("the JSON ends too early, at %s; %s", at, form)
	}
	return fmt.Errorf("not JSON, at %s: %w; %s", at, err, form)
}

// parseRule reads one rule.
func (s ruleSource) parseRule(raw json.RawMessage) (r rule, err error) {
	if raw[0] != '{' {
		return r, fmt.Errorf("a JSON %s instead of an object; %s", kindOf(raw), form)
	}
	r.from = "name"
	var (
		pattern string
		given   = map[string]bool{}
		decoder = json.NewDecoder(bytes.NewReader(raw))
	)
	decoder.Token() // the brace; raw is known to be JSON
	for decoder.More() {
		token, _ := decoder.Token()
		key := strings.ToLower(token.(string)) // encoding/json ignores case too
		var value json.RawMessage
		decoder.Decode(&value)
		if given[key] {
			return r, fmt.Errorf("the key %q is there twice", key)
		}
		given[key] = true
		switch key {
		case "regexp":
			pattern, err = s.stringOf(key, value)
		case "into":
			r.rename = true
			r.into, err = s.stringOf(key, value)
		case "from":
			r.from, err = s.stringOf(key, value)
		case "category":
			r.category, err = s.stringOf(key, value)
		case "drop":
			r.drop, err = boolOf(key, value)
		default:
			const wrong = "unknown key %q; the keys are regexp, into, from, category, drop"
			err = fmt.Errorf(wrong, token)
		}
		if err != nil {
			return r, err
		}
	}
	if !given["regexp"] {
		return r, errors.New(`the key "regexp" is missing; ` + form)
	}
	err = compileRule(&r, pattern)
	return r, err
}

// stringOf reads the string that is the value of a key.
func (s ruleSource) stringOf(key string, value json.RawMessage) (text string, err error) {
	if kindOf(value) != "string" {
		const wrong = "%q is a JSON %s instead of a string; %s"
		return "", fmt.Errorf(wrong, key, kindOf(value), form)
	}
	if err := json.Unmarshal(value, &text); err != nil {
		return "", err
	}
	// In JSON, \b is a backspace and \t a tab. Neither a name nor a regexp has these.
	if strings.IndexFunc(text, unicode.IsControl) >= 0 {
		return "", fmt.Errorf("%q has a single backslash, "+
			"which JSON takes for a control character, in %s: %s", key, oneLine(string(value)), s.remedy())
	}
	return text, nil
}

// boolOf reads the boolean that is the value of a key.
func boolOf(key string, value json.RawMessage) (bool, error) {
	if kindOf(value) != "boolean" {
		return false, fmt.Errorf("%q is a JSON %s instead of true or false", key, kindOf(value))
	}
	return value[0] == 't', nil
}

// compileRule checks the values of r, and compiles its pattern.
func compileRule(r *rule, pattern string) (err error) {
	if err := checkFrom(r); err != nil {
		return err
	}
	if r.regexp, err = regexp.Compile(pattern); err != nil {
		return explainRegexp(pattern, err)
	}
	if err := checkTemplate(r.into, r.regexp); err != nil {
		return err
	}
	if isEmptied(r, pattern) {
		const wrong = `"into" is only %q, and no group is in it: ` +
			"a shell removed those, such as $1, if the rule was in double quotes; %s"
		return fmt.Errorf(wrong, r.into, quoting)
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
		return fmt.Errorf("no category can be called %q: "+
			"Carbon aggregates metrics with such an ending differently; choose another name", r.category)
	}
	return nil
}

// isEmptied reports whether nothing of a name would be left, though r has groups: a shell takes $1
// for a variable of its own.
func isEmptied(r *rule, pattern string) bool {
	if !r.rename || r.regexp.NumSubexp() == 0 || strings.Trim(r.into, "._-") != "" {
		return false
	}
	start := strings.TrimPrefix(pattern, "^")
	takesAll := strings.HasPrefix(start, "(.*)") || strings.HasPrefix(start, "(.+)")
	return matchesAll(pattern, false) || takesAll && r.into != ""
}

// checkFrom refuses a "from" that rules cannot see.
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
		if strings.Contains(before.into, "${label:") {
			continue // it does not match a container without that label
		}
		const unreachable = "it can never be reached: rule %d "
		isLabel := strings.HasPrefix(before.from, "label:")
		switch {
		case before.from == r.from && before.regexp.String() == r.regexp.String():
			return fmt.Errorf(unreachable+"has the same regexp; put them together", i+1)
		case (before.from == r.from || !isLabel) && matchesAll(before.regexp.String(), isLabel):
			return fmt.Errorf(unreachable+"matches everything it sees; put it behind this one", i+1)
		}
	}
	return nil
}

// matchesAll reports whether a regular expression surely matches every text. With anyText, a
// text may be empty or have several lines.
func matchesAll(pattern string, anyText bool) bool {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return false
	}
	parts := []*syntax.Regexp{withoutGroups(re)}
	if parts[0].Op == syntax.OpConcat {
		parts = parts[0].Sub
	}
	parts, anchored := withoutAnchors(parts)
	if len(parts) == 1 && takesAll(withoutGroups(parts[0]), anyText) {
		return true
	}
	// Else it matches every text if it matches nothing, somewhere.
	return !anchored && !slices.ContainsFunc(parts, neverEmpty)
}

// withoutAnchors removes ^ from the start and $ from the end. It reports whether both were there.
func withoutAnchors(parts []*syntax.Regexp) (rest []*syntax.Regexp, both bool) {
	begins, ends := false, false
	for len(parts) > 0 && parts[0].Op == syntax.OpBeginText {
		begins, parts = true, parts[1:]
	}
	for len(parts) > 0 && parts[len(parts)-1].Op == syntax.OpEndText {
		ends, parts = true, parts[:len(parts)-1]
	}
	return parts, begins && ends
}

// takesAll reports whether re is .* or .+ and so matches a whole text. See matchesAll.
func takesAll(re *syntax.Regexp, anyText bool) bool {
	if re.Op != syntax.OpStar && (re.Op != syntax.OpPlus || anyText) {
		return false
	}
	of := withoutGroups(re.Sub[0]).Op
	return of == syntax.OpAnyChar || of == syntax.OpAnyCharNotNL && !anyText
}

// matchesEmpty reports whether re surely matches the empty text, wherever that is.
func matchesEmpty(re *syntax.Regexp) bool {
	switch re.Op {
	case syntax.OpEmptyMatch, syntax.OpStar, syntax.OpQuest:
		return true
	case syntax.OpRepeat:
		return re.Min == 0 || matchesEmpty(re.Sub[0])
	case syntax.OpCapture, syntax.OpPlus:
		return matchesEmpty(re.Sub[0])
	case syntax.OpConcat:
		return !slices.ContainsFunc(re.Sub, neverEmpty)
	case syntax.OpAlternate:
		return slices.ContainsFunc(re.Sub, matchesEmpty)
	}
	return false
}

func neverEmpty(re *syntax.Regexp) bool { return !matchesEmpty(re) }

// withoutGroups removes the parentheses around all of re.
func withoutGroups(re *syntax.Regexp) *syntax.Regexp {
	for re.Op == syntax.OpCapture {
		re = re.Sub[0]
	}
	return re
}

// explainRegexp adds to an error of Compile where in the pattern the mistake is.
func explainRegexp(pattern string, err error) error {
	at := 1
	var wrong *syntax.Error
	if errors.As(err, &wrong) && wrong.Expr != pattern && strings.Count(pattern, wrong.Expr) == 1 {
		at += strings.Index(pattern, wrong.Expr)
	} else {
		// The mistake follows the longest start that parses.
		for end := len(pattern) - 1; end > 0; end-- {
			if _, err := syntax.Parse(pattern[:end], syntax.Perl); err == nil {
				at += end
				break
			}
		}
	}
	return fmt.Errorf(`in "regexp": %s, at byte %d of %s; `+
		`the syntax is that of https://pkg.go.dev/regexp/syntax`,
		strings.TrimPrefix(oneLine(err.Error()), "error parsing regexp: "), at, pattern)
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
			remedy := fmt.Sprintf("the regexp has %s", groups(re))
			if strings.EqualFold(group, "hostname") || strings.EqualFold(group, "host") {
				remedy = "the host's name is ${host}"
			} else if braced, rest := splitGroup(re, group); braced != "" && template[i+1] != '{' {
				remedy = fmt.Sprintf("write ${%s}%s, since a group's name goes on "+
					"as long as there are letters, digits and underscores", braced, rest)
			}
			return fmt.Errorf(`in "into": %s names the group %q, which the regexp does not have; %s`,
				template[i:i+length], group, remedy)
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

// groups describes the groups of re.
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
