package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// How to get a --prefix unharmed through whatever stands between the user and us. Each
// form was tried on what it names; the README shows them too.
const quoting = `put the whole of it in single quotes; ` +
	`in a shell: --prefix='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'; ` +
	`in a systemd unit, with the backslashes doubled again: '--prefix={"regexp":"(.*)\\\\..*\\\\.(.*)\\\\..*","into":"$1.$2"}'; ` +
	`in a systemd EnvironmentFile: SRV_PREFIX='{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}'; ` +
	`or put it into a file: --prefix=@/etc/docker-stats-to-backstop.json`

// form is the remedy where nothing more exact can be said.
const form = `the form is {"regexp":"…","into":"…"}, or a list of such: [{…},{…}]`

// parseRules reads what is given to --prefix: a rule in JSON, a list of them, or @ and the file that has them. Its errors are
// one line that says what is wrong and how to mend it.
func parseRules(text string) (rules, error) {
	source := ruleSource{text: text}
	if path, ok := strings.CutPrefix(text, "@"); ok {
		body, err := readText(path)
		if err != nil {
			return nil, fmt.Errorf("%w: @ and the path of a file that can be read is wanted", err)
		}
		source = ruleSource{body, path}
	} else if !strings.HasPrefix(text, "{") && !strings.HasPrefix(text, "[") && strings.Contains(text, "://") {
		return nil, fmt.Errorf("not a rule, and %s; %s", shown(text), form) // such as the next option, for want of a value
	}
	var all json.RawMessage
	if err := json.Unmarshal([]byte(source.text), &all); err != nil {
		return nil, source.explain(err)
	}
	list, isList := []json.RawMessage{all}, all[0] == '['
	switch {
	case isList:
		if err := json.Unmarshal(all, &list); err != nil {
			return nil, source.explain(err)
		}
		if len(list) == 0 {
			return nil, source.in(errors.New("the list has no rule in it; " + form))
		}
	case all[0] != '{':
		return nil, source.in(fmt.Errorf("a JSON %s where an object or a list is wanted; %s", kindOf(all), form))
	}
	var rs rules
	for i, raw := range list {
		r, err := source.parseRule(raw)
		if err == nil {
			err = rs.useful(r, i == len(list)-1)
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

// ruleSource is where rules were read from.
type ruleSource struct{ text, file string }

// in says which file an error is about.
func (s ruleSource) in(err error) error {
	if s.file == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.file, err)
}

// at says where in the source a byte is, counted from 1.
func (s ruleSource) at(offset int) string {
	if s.file == "" {
		return fmt.Sprintf("byte %d of %s", offset, oneLine(s.text))
	}
	before := s.text[:min(max(offset-1, 0), len(s.text))]
	return fmt.Sprintf("line %d, column %d", strings.Count(before, "\n")+1, len(before)-strings.LastIndex(before, "\n"))
}

// remedy is how to keep backslashes and quotes in what is not a file.
func (s ruleSource) remedy() string {
	if s.file == "" {
		return "systemd or a shell took it out, or it was never there; " + quoting
	}
	return "in JSON, write each of them twice"
}

// explain turns an error of encoding/json into what its reader has to do.
func (s ruleSource) explain(err error) error {
	var wrong *json.SyntaxError
	errors.As(err, &wrong) // there is no other error for a json.RawMessage
	at := s.at(int(wrong.Offset))
	switch {
	case s.text == "":
		err = errors.New("empty; " + form)
	case s.file == "" && !strings.Contains(s.text, `"`) && strings.ContainsAny(s.text, "{:"):
		err = fmt.Errorf("it arrived without its double quotes, as %s: systemd or a shell took them out; %s", oneLine(s.text), quoting)
	case strings.Contains(err.Error(), "in string escape code"):
		err = fmt.Errorf(`there is a single backslash before %s, and the \. of a regexp is \\. in JSON: %s`, at, s.remedy())
	case strings.Contains(err.Error(), "after top-level value"):
		err = fmt.Errorf("something follows the JSON, at %s; leave only the rule or the list", at)
	case strings.Contains(err.Error(), "unexpected end"):
		err = fmt.Errorf("the JSON ends too early, at %s; %s", at, form)
	default:
		err = fmt.Errorf("not JSON, at %s: %w; %s", at, err, form)
	}
	return s.in(err)
}

var ruleKeys = []string{"regexp", "into", "from", "category", "drop"}

// parseRule reads one rule.
func (s ruleSource) parseRule(raw json.RawMessage) (rule, error) {
	if raw[0] != '{' {
		return rule{}, fmt.Errorf("a JSON %s where an object is wanted; %s", kindOf(raw), form)
	}
	var (
		r       = rule{from: "name"}
		pattern *string
		given   = map[string]bool{}
		decoder = json.NewDecoder(bytes.NewReader(raw))
	)
	decoder.Token() // the brace; raw is known to be JSON
	for decoder.More() {
		token, _ := decoder.Token()
		key := strings.ToLower(token.(string)) // as encoding/json has it
		var value json.RawMessage
		decoder.Decode(&value)
		if given[key] {
			return rule{}, fmt.Errorf("the key %q is there twice", key)
		}
		given[key] = true
		var err error
		switch key {
		case "regexp":
			pattern = new(string)
			*pattern, err = s.stringOf(key, value)
		case "into":
			r.rename = true
			r.into, err = s.stringOf(key, value)
		case "from":
			r.from, err = s.stringOf(key, value)
		case "category":
			r.category, err = s.stringOf(key, value)
		case "drop":
			if err = json.Unmarshal(value, &r.drop); err != nil || kindOf(value) == "null" {
				err = fmt.Errorf("%q is a JSON %s where true or false is wanted", key, kindOf(value))
			}
		default:
			err = fmt.Errorf("unknown key %q; did you mean %q? The keys are %s", token, nearest(key, ruleKeys), strings.Join(ruleKeys, ", "))
		}
		if err != nil {
			return rule{}, err
		}
	}
	if pattern == nil {
		return rule{}, errors.New(`the key "regexp" is missing; ` + form)
	}
	if err := r.checkFrom(); err != nil {
		return rule{}, err
	}
	var err error
	if r.regexp, err = regexp.Compile(*pattern); err != nil {
		return rule{}, explainRegexp(*pattern, err)
	}
	if err := checkTemplate(r.into, r.regexp); err != nil {
		return rule{}, err
	}
	if r.category != "" {
		r.category = graphiteNode(r.category)
		switch r.category {
		case "total", "running", "paused", "stopped":
			return rule{}, fmt.Errorf("the category %q is taken: <host>.containers.%[1]s is another figure; choose another name", r.category)
		case "max", "min", "count":
			return rule{}, fmt.Errorf("no category can be called %q: Carbon aggregates metrics with such an ending differently; choose another name", r.category)
		}
	}
	return r, nil
}

// stringOf reads the string that is the value of a key.
func (s ruleSource) stringOf(key string, value json.RawMessage) (text string, err error) {
	if kindOf(value) != "string" {
		return "", fmt.Errorf("%q is a JSON %s where a string is wanted; %s", key, kindOf(value), form)
	}
	if err := json.Unmarshal(value, &text); err != nil {
		return "", err
	}
	// In JSON, \b is a backspace and \t a tab, which neither a name nor a regular expression has.
	if strings.IndexFunc(text, unicode.IsControl) >= 0 {
		return "", fmt.Errorf("%q has a single backslash, which JSON takes for a control character, in %s: %s", key, oneLine(string(value)), s.remedy())
	}
	return text, nil
}

// kindOf is what JSON calls a value.
func kindOf(value json.RawMessage) string {
	switch value[0] {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	case 'n':
		return "null"
	}
	return "number"
}

// checkFrom refuses what there is not to see.
func (r *rule) checkFrom() error {
	key, isLabel := strings.CutPrefix(r.from, "label:")
	switch {
	case isLabel && key != "", r.from == "name", r.from == "image", r.from == "id":
		return nil
	case isLabel || r.from == "label":
		return errors.New(`"from" names no label: want "label:" and its key, such as "label:com.docker.compose.project"`)
	}
	return fmt.Errorf(`"from" is %q; want "name", "image", "id", or "label:" and a label's key; did you mean %q?`, r.from,
		nearest(r.from, []string{"name", "image", "id"}))
}

// useful refuses a rule that has no effect behind the rules rs.
func (rs rules) useful(r rule, last bool) error {
	switch {
	case r.drop && (r.rename || r.category != ""):
		return errors.New(`"drop" leaves the container out altogether, so "into" and "category" do nothing beside it; leave them out`)
	case last && !r.drop && !r.rename && r.category == "":
		return errors.New(`it does nothing, and no rule follows that it could keep from a container; give it an "into", a "category" or a "drop", or leave it out`)
	}
	for i, before := range rs {
		if strings.Contains(before.into, "${label:") {
			continue // it does not match a container without that label
		}
		isLabel := strings.HasPrefix(before.from, "label:")
		switch {
		case before.from == r.from && before.regexp.String() == r.regexp.String():
			return fmt.Errorf("it can never be reached: rule %d has the same regexp; put them together", i+1)
		case (before.from == r.from || !isLabel) && matchesAll(before.regexp.String(), isLabel):
			return fmt.Errorf("it can never be reached: rule %d matches everything it sees; put it behind this one", i+1)
		}
	}
	return nil
}

// matchesAll tells whether a regular expression surely matches every text; anyText says whether that may be empty
// or have several lines.
func matchesAll(pattern string, anyText bool) bool {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return false
	}
	parts := []*syntax.Regexp{withoutGroups(re)}
	if parts[0].Op == syntax.OpConcat {
		parts = parts[0].Sub
	}
	begins, ends := false, false
	for len(parts) > 0 && parts[0].Op == syntax.OpBeginText {
		begins, parts = true, parts[1:]
	}
	for len(parts) > 0 && parts[len(parts)-1].Op == syntax.OpEndText {
		ends, parts = true, parts[:len(parts)-1]
	}
	if len(parts) == 1 {
		what := withoutGroups(parts[0])
		if what.Op == syntax.OpStar || what.Op == syntax.OpPlus && !anyText {
			if of := withoutGroups(what.Sub[0]).Op; of == syntax.OpAnyChar || of == syntax.OpAnyCharNotNL && !anyText {
				return true
			}
		}
	}
	// Else it does if it matches nothing, somewhere.
	return !(begins && ends) && !slices.ContainsFunc(parts, func(re *syntax.Regexp) bool { return !matchesEmpty(re) })
}

// matchesEmpty tells whether re surely matches the empty text, wherever that is.
func matchesEmpty(re *syntax.Regexp) bool {
	switch re.Op {
	case syntax.OpEmptyMatch, syntax.OpStar, syntax.OpQuest:
		return true
	case syntax.OpRepeat:
		return re.Min == 0 || matchesEmpty(re.Sub[0])
	case syntax.OpCapture, syntax.OpPlus:
		return matchesEmpty(re.Sub[0])
	case syntax.OpConcat:
		return !slices.ContainsFunc(re.Sub, func(re *syntax.Regexp) bool { return !matchesEmpty(re) })
	case syntax.OpAlternate:
		return slices.ContainsFunc(re.Sub, matchesEmpty)
	}
	return false
}

// withoutGroups is what is in the parentheses around all of re.
func withoutGroups(re *syntax.Regexp) *syntax.Regexp {
	for re.Op == syntax.OpCapture {
		re = re.Sub[0]
	}
	return re
}

// explainRegexp says where in a pattern the mistake is that Compile found.
func explainRegexp(pattern string, err error) error {
	at := 1
	var wrong *syntax.Error
	if errors.As(err, &wrong) && wrong.Expr != pattern && strings.Count(pattern, wrong.Expr) == 1 {
		at += strings.Index(pattern, wrong.Expr)
	} else {
		// Behind the longest start that is well.
		for end := len(pattern) - 1; end > 0; end-- {
			if _, err := syntax.Parse(pattern[:end], syntax.Perl); err == nil {
				at += end
				break
			}
		}
	}
	return fmt.Errorf(`in "regexp": %s, at byte %d of %s; the syntax is that of https://pkg.go.dev/regexp/syntax`,
		strings.TrimPrefix(oneLine(err.Error()), "error parsing regexp: "), at, pattern)
}

// nearest returns the one of the words that is most like word.
func nearest(word string, words []string) string {
	return slices.MinFunc(words, func(a, b string) int { return distance(word, a) - distance(word, b) })
}

// distance is that of Levenshtein: how many letters have to be put in, taken out or changed.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			changed := diagonal
			if a[i] != b[j] {
				changed++
			}
			diagonal = row[j+1]
			row[j+1] = min(changed, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// checkTemplate refuses a template that names a group re does not have: Expand would
// silently put nothing in its place.
func checkTemplate(template string, re *regexp.Regexp) error {
	for i := 0; i < len(template); {
		if template[i] != '$' {
			i++
			continue
		}
		group, length := templateRef(template[i:])
		if length == 0 { // a "$" that Expand leaves as it is
			return fmt.Errorf(`in "into": the $ at byte %d of %s names no group; write $$ for a dollar sign`, i+1, template)
		}
		known := group == "" || group == "host" || strings.HasPrefix(group, "label:") || hasGroup(re, group)
		if !known {
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

// What Expand takes for a reference, and what fillIn does.
var templateRefs = regexp.MustCompile(`^\$(?:\$|([\pL\p{Nd}_]+)|\{([\pL\p{Nd}_]+|label:[^{}]+)\})`)

// templateRef returns what a template that starts with "$" refers to: the name of a group, "host", "label:" and a key, "" for "$$"; and the length
// of that reference, 0 where it is none.
func templateRef(template string) (ref string, length int) {
	m := templateRefs.FindStringSubmatch(template)
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
		if hasGroup(re, group[:end]) || group[:end] == "host" {
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
