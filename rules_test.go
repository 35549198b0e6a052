package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// The errors are all there is between a user and a dashboard that stays empty: each has to
// say what is wrong and what to write instead, in one line.
func TestRuleRefusals(t *testing.T) {
	for _, test := range []struct{ rule, want string }{
		{`web`, `^not JSON, at byte 1 of web: .*; the form is \{"regexp":"…","into":"…"\}, or a list ` +
			`of such: \[\{…\},\{…\}\]$`},
		{`{"regexp":"a","into":"b"`, `^the JSON ends too early, at byte 24 of .*; the form is `},
		{`{"regexp":"a","into":"b"}}`, `^something follows the JSON, at byte 26 of `},
		{`["a"]`, `^rule 1: a JSON string where an object is wanted; the form is `},
		{`null`, `^a JSON null where an object or a list is wanted; the form is `},
		{`"web"`, `^a JSON string where an object or a list is wanted; the form is `},
		{``, `^empty; the form is `},
		{`[]`, `^the list has no rule in it; the form is `},
		{`[{"regexp":"a","into":"b"},{"regexp":"a"`,
			`^the JSON ends too early, at byte 40 of .*; the form is `},
		{`[{"regexp":"a","into":"b"},{"into":"c"}]`,
			`^rule 2: the key "regexp" is missing; the form is `},
		{`{"into":"b"}`, `^the key "regexp" is missing; the form is `},
		{`{"regexp":"a","into":"b","inot":"c"}`,
			`^unknown key "inot"; the keys are regexp, into, from, category, drop$`},
		{`[{"regexp":"a","into":"b"},{"regex":"c"}]`,
			`^rule 2: unknown key "regex"; the keys are `},
		{`{"regexp":"a","into":"b","regexp":"c"}`, `^the key "regexp" is there twice$`},
		{`{"regexp":"a","drop":"true"}`, `^"drop" is a JSON string where true or false is wanted$`},
		{`{"regexp":"a","drop":null}`, `^"drop" is a JSON null where true or false is wanted$`},
		{`{"regexp":"a","category":["b"]}`, `^"category" is a JSON array where a string is wanted`},
		{`{"regexp":null,"into":"b"}`, `^"regexp" is a JSON null where a string is wanted`},
		// What there is to see, and to count
		{`{"from":"nmae","regexp":"a","into":"b"}`,
			`^"from" is "nmae"; want "name", "image", "id", or "label:" and a label's key$`},
		{`{"from":"label","regexp":"a","into":"b"}`,
			`^"from" names no label: want "label:" and its key, such as ` +
				`"label:com.docker.compose.project"$`},
		{`{"from":"label:","regexp":"a","into":"b"}`, `^"from" names no label`},
		{`{"regexp":"a","category":"running"}`,
			`^the category "running" is taken: <host>\.containers\.running is another figure; choose ` +
				`another name$`},
		{`{"regexp":"a","category":"total"}`, `^the category "total" is taken`},
		{`{"regexp":"a","category":"count"}`, `^no category can be called "count": Carbon aggregates`},
		// Without effect
		{`{"regexp":"a"}`, `^it does nothing, and no rule follows that it could keep from a ` +
			`container; give it an "into", a "category" or a "drop", or leave it out$`},
		{`[{"regexp":"a","into":"b"},{"regexp":"a","drop":false}]`, `^rule 2: it does nothing`},
		{`{"regexp":"a","drop":true,"category":"b"}`,
			`^"drop" leaves the container out altogether, so "into" and "category" do nothing beside it; ` +
				`leave them out$`},
		{`[{"regexp":"a","into":"b"},{"regexp":"a","into":"c"}]`,
			`^rule 2: it can never be reached: rule 1 has the same regexp; put them together$`},
		{`[{"regexp":"x","into":"b"},{"regexp":".*","into":"b"},{"from":"image","regexp":"a",` +
			`"into":"c"}]`, `^rule 3: it can never be reached: rule 2 matches everything it sees; put it ` +
			`behind this one$`},
		{`[{"from":"label:l","regexp":"","into":"b"},{"from":"label:l","regexp":"a","into":"c"}]`,
			`^rule 2: it can never be reached: rule 1 matches`},
		{`{"regexp":1,"into":"b"}`, `^"regexp" is a JSON number where a string is wanted; the form is `},
		{`{"regexp":"a(","into":"b"}`,
			"^in \"regexp\": missing closing \\): `a\\(`, at byte 2 of a\\(; the syntax is that of " +
				"https://"},
		{`{"regexp":"(a)(b","into":"b"}`, `at byte 4 of \(a\)\(b; `},
		{`{"regexp":"a)","into":"b"}`, `unexpected \).*, at byte 2 of a\); `},
		{`{"regexp":"ab**c*","into":"b"}`,
			`invalid nested repetition operator.*, at byte 3 of ab\*\*c\*; `},
		{`{"regexp":"a*b|*","into":"b"}`,
			`missing argument to repetition operator.*, at byte 5 of a\*b\|\*; `},
		{`{"regexp":"ab[c","into":"b"}`, `missing closing \].*, at byte 3 of ab\[c; `},
		{`{"regexp":"a(?!b)","into":"b"}`,
			`invalid or unsupported Perl syntax.*, at byte 2 of a\(\?!b\); `},
		{`{"regexp":"ab\\","into":"b"}`, `trailing backslash.*, at byte 3 of ab\\; `},
		{`[{"regexp":"(","into":"b"}]`, `^rule 1: in "regexp": `},
		// A group that is not there
		{`{"regexp":"(.*)","into":"$1_x"}`, `\$1_x names the group "1_x", .*; write \$\{1\}_x, since`},
		{`{"regexp":"(?P<name>.*)","into":"$nameX"}`,
			`\$nameX names the group "nameX", .*; write \$\{name\}X, since`},
		{`{"regexp":"(.*)","into":"$2"}`, `\$2 names the group "2", .*; the regexp has one group, \$1$`},
		{`{"regexp":"(.*)-(.*)","into":"${3}"}`,
			`\$\{3\} names .*; the regexp has 2 groups, \$1 to \$2$`},
		{`{"regexp":".*","into":"$1"}`,
			`\$1 names .*; the regexp has no groups \(those are its parentheses\)$`},
		{`{"regexp":"(.*)","into":"$01"}`, `\$01 names the group "01"`}, // for Expand that is a name
		{`{"regexp":"(.*)","into":"$1 $"}`,
			`the \$ at byte 4 of \$1 \$ names no group; write \$\$ for a dollar sign$`},
		// What is left of the unit of 2015 after today's systemd, and of a prefix in the
		// double quotes of a shell
		{`{regexp:(.*)\\..*\\.(.*)\\..*,into:$1.$2}`,
			`^it arrived without its double quotes, as \{regexp:.*: systemd or a shell took them out; ` +
				`put the whole of it in single quotes; .*'--prefix=\{"regexp":"\(\.\*\)\\\\\\\\\.\.\*.*`},
		{`{regexp:(.*)\..*,into:.}`, `^it arrived without its double quotes`},
		{`{"regexp":"\bweb\b","into":"$1"}`,
			`^"regexp" has a single backslash, which JSON takes for a control character, in .*: systemd ` +
				`or a shell took it out, or it was never there; put the whole of it in single quotes; `},
		// the last of a bash's brace expansion
		{`into:.`, `^it arrived without its double quotes, as into:\.: systemd or a shell took them ` +
			`out; `},
		{`--backstop=https://user:secret@h/publish/docker`,
			`^not a rule, and "?\(not shown, as it may hold a password\)"?; the form is `},
		{`{"regexp":"(.*)\..*","into":"$1"}`,
			`^there is a single backslash before byte 17 of .*; put the whole of it in single quotes; `},
		{"{\"regexp\":\n\"(\",\"into\":\"\"}\n\n#", "^something follows"},
		{`{"regexp":"(.*)","into":"$host_x"}`,
			`\$host_x names the group "host_x", which the regexp does not have; write \$\{host\}_x, since`},
		{`{"regexp":"(.*)","into":"${label:}"}`, `the \$ at byte 1 of \$\{label:\} names no group`},
	} {
		_, err := parseRules(test.rule)
		switch {
		case err == nil:
			t.Errorf("%s was not refused", test.rule)
		case strings.Contains(err.Error(), "\n"):
			t.Errorf("%s: more than one line: %v", test.rule, err)
		case !regexp.MustCompile(test.want).MatchString(err.Error()):
			t.Errorf("%s:\n got %s\nwant %s", test.rule, err, test.want)
		}
	}
}

func TestRulesThatAreNotRefused(t *testing.T) {
	for _, text := range []string{
		`[{"regexp":"^a"},{"regexp":".*","into":"b"}]`,
		`[{"from":"label:a","regexp":".*","into":"b"},{"from":"label:b","regexp":".*","into":"b"},` +
			`{"from":"name","regexp":"a","into":"b"}]`,
		// a label can have two lines
		`[{"from":"label:a","regexp":"^.*$","into":"b"},{"from":"label:a","regexp":"a","into":"b"}]`,
		`[{"regexp":".*","into":"${label:a}"},{"regexp":".*","into":"b"}]`,
		`{"Regexp":"a","INTO":"b"}`, // as in 2015
		`{"regexp":"a","into":"b","category":""}`,
		" [ {\"regexp\" : \"a\" , \"into\" : \"b\"} ] \n",
	} {
		if _, err := parseRules(text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestMatchesAll(t *testing.T) {
	for pattern, want := range map[string]bool{
		"": true, ".*": true, "(.*)": true, "^.*$": true, "^(.*)$": true, "^(?P<a>.*)$": true, ".+": true,
		"^(.+)$": true, "a*": true, "^": true, "$": true,
		"^a*": true, "a?b*": true, "(a|b*)": true, "((.*))": true, "(?s)^.*$": true, `\A.*\z`: true,
		"a": false, "^$": false, "^a*$": false, "a+": false, ".*a": false, "^.+a": false, `\b`: false,
		"(.*)\\.(.*)": false, "..*": false, "^web": false,
	} {
		if got := matchesAll(pattern, false); got != want {
			t.Errorf("%s matches every name: %t", pattern, got)
		}
	}
	for pattern, want := range map[string]bool{"": true, ".*": true, "(?s)^.*$": true, "^.*$": false,
		".+": false, "(?s).+": false} {
		if got := matchesAll(pattern, true); got != want {
			t.Errorf("%s matches every label: %t", pattern, got)
		}
	}
}

func TestRulesOfAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "prefix.json")
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("[\n  {\"regexp\": \"^a$\", \"into\": \"b\"},\n  {\"regexp\": \"c\", \"drop\": true}\n]\n")
	rs, err := parseRules("@" + path)
	if err != nil || len(rs) != 2 || rs.apply(subject{name: "a"}, "").path != "b" {
		t.Errorf("%v, %v", rs, err)
	}
	for text, want := range map[string]string{
		"":     ": empty; the form is ",
		"\n\n": ": empty; the form is ",
		"[\n {\"regexp\": \"a\\.b\"}]": `: there is a single backslash before line 2, column ` +
			`16, and the \. of a regexp is \\. in JSON: in JSON, write each of them twice`,
		"[\n {\"regexp\": \"a\" \"into\"}]": `: not JSON, at line 2, column 17: invalid character ` +
			`'"' after object key:value pair; the form is `,
		"[\n {\"regexp\": \"a\", \"drop\": 1}]": `: rule 1: "drop" is a JSON number where true or ` +
			`false is wanted`,
		"{regexp:a}": ": not JSON, at line 1, column 2: ",
		"[]":         ": the list has no rule in it; ",
		"5":          ": a JSON number where an object or a list is wanted; ",
		"[":          ": the JSON ends too early, at line 1, column 1; the form is ",
	} {
		write(text)
		_, err := parseRules("@" + path)
		if err == nil || !strings.HasPrefix(err.Error(), path+want) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	for _, path := range []string{"", "/no/such/file", t.TempDir()} {
		if _, err := parseRules("@" + path); err == nil || !strings.Contains(err.Error(), path) ||
			!strings.HasSuffix(err.Error(), "@ and the path of a file that can be read is wanted") {
			t.Errorf("@%s: %v", path, err)
		}
	}
}

// Each recipe does what it says. A row has a container's name, its labels, as key=value, or its
// image; a rule, or "the same" as above; and the path that comes out, or none.
func TestRecipes(t *testing.T) {
	recipes := harness.Section(t, "docs/names.md", "## Recipes")
	rows := regexp.MustCompile("(?m)^\\| ([^|]*`[^|]*) \\| (?:`([\\[{].*[\\]}])`|the same) \\| "+
		"(?:`([^`]+)\\.\\*`|none) \\|$").FindAllStringSubmatch(recipes, -1)
	if len(rows) != strings.Count(recipes, "\n| ")-2 {
		t.Errorf("of the table's rows, only %d are understood", len(rows))
	}
	var rs rules
	for _, row := range rows {
		if row[2] != "" {
			rs = mustRules(t, row[2])
		}
		ticked := harness.AllInOrder("`([^`]+)`", row[1])
		s, host := subject{name: ticked[0], labels: map[string]string{}}, "h"
		for _, text := range ticked[1:] {
			if key, value, isLabel := strings.Cut(text, "="); isLabel {
				s.labels[key] = value
			} else if strings.Contains(text, "/") {
				s.image = text
			} else {
				host = text
			}
		}
		n := rs.apply(s, host)
		if n.drop {
			n.path = ""
		}
		if n.path != row[3] {
			t.Errorf("%s makes %q of %+v, docs/names.md says %q", row[2], n.path, s, row[3])
		}
	}
}

// What the documents have for a shell arrives as it should.
func TestQuotingInAShell(t *testing.T) {
	forms := harness.AllOf(`(--prefix='[^']+')`, harness.Documentation(t))
	if len(forms) < 2 {
		t.Fatalf("only %q", forms)
	}
	for _, form := range forms {
		if strings.Contains(form, `\\\\`) {
			continue // a systemd unit's
		}
		got, err := exec.Command("sh", "-c", "printf %s "+form).Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseRules(strings.TrimPrefix(string(got), "--prefix=")); err != nil {
			t.Errorf("%s: %v", form, err)
		}
	}
}

// The same forms in the error text, docs/names.md and the file for the unit.
func TestQuotingIsTheSameEverywhere(t *testing.T) {
	names := harness.Section(t, "docs/names.md", "## Quoting")
	forms := harness.AllOf(`((?:SRV_PREFIX=|--prefix=|)'[^']+')`, quoting)
	if len(forms) != 3 {
		t.Fatalf("forms %q", forms)
	}
	for _, form := range forms {
		if !strings.Contains(names, form) {
			t.Errorf("docs/names.md lacks %s", form)
		}
	}
	if !strings.Contains(harness.ReadFile(t, "deploy/docker-stats-to-backstop.default"), forms[2]) {
		t.Errorf("the file for the systemd unit lacks %s", forms[2])
	}
}
