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
		{`["a"]`, `^rule 1: a JSON string instead of an object; the form is `},
		{`null`, `^the key "regexp" is missing; the form is `},
		{`"web"`, `^a JSON string instead of an object; the form is `},
		{``, `^empty; the form is `},
		{`[]`, `^the list has no rule in it; the form is `},
		{`[{"regexp":"a","into":"b"},{"regexp":"a"`,
			`^the JSON ends too early, at byte 40 of .*; the form is `},
		{`[{"regexp":"a","into":"b"},{"into":"c"}]`,
			`^rule 2: the key "regexp" is missing; the form is `},
		{`{"into":"b"}`, `^the key "regexp" is missing; the form is `},
		{`{"regexp":"a","into":"b","inot":"c"}`,
			`^unknown field "inot"; the keys are regexp, into, from, category, drop$`},
		{`[{"regexp":"a","into":"b"},{"regex":"c"}]`,
			`^rule 2: unknown field "regex"; the keys are `},
		{`{"regexp":"a","drop":"true"}`, `^"drop" is a JSON string instead of a bool; `},
		{`{"regexp":"a","category":["b"]}`, `^"category" is a JSON array instead of a string`},
		{`{"regexp":null,"into":"b"}`, `^the key "regexp" is missing; the form is `},
		// What there is to see, and to count
		{`{"from":"nmae","regexp":"a","into":"b"}`,
			`^"from" is "nmae"; write "name", "image", "id", or "label:" and a label's key$`},
		{`{"from":"label","regexp":"a","into":"b"}`,
			`^"from" names no label: write "label:" and its key, such as ` +
				`"label:com.docker.compose.project"$`},
		{`{"from":"label:","regexp":"a","into":"b"}`, `^"from" names no label`},
		{`{"regexp":"a","category":"running"}`,
			`^the category "running" is taken: <host>\.containers\.running is another figure; choose ` +
				`another name$`},
		{`{"regexp":"a","category":"total"}`, `^the category "total" is taken`},
		{`{"regexp":"a","category":"count"}`, `^no category can be called "count": Carbon aggregates`},
		// Without effect
		{`{"regexp":"a"}`, `^it has no effect, as no rule follows it; ` +
			`give it an "into", a "category" or a "drop", or leave it out$`},
		{`[{"regexp":"a","into":"b"},{"regexp":"a","drop":false}]`, `^rule 2: it has no effect`},
		{`{"regexp":"a","drop":true,"category":"b"}`,
			`^"drop" leaves the container out altogether, so "into" and "category" have no effect; ` +
				`leave them out$`},
		{`[{"regexp":"a","into":"b"},{"regexp":"a","into":"c"}]`,
			`^rule 2: it can never be reached: rule 1 has the same regexp; put them together$`},
		{`{"regexp":1,"into":"b"}`, `^"regexp" is a JSON number instead of a string; the form is `},
		{`{"regexp":"a(","into":"b"}`,
			"^in \"regexp\": missing closing \\): `a\\(`; the syntax is that of https://"},
		{`{"regexp":"ab**c*","into":"b"}`, "invalid nested repetition operator: `\\*\\*`; "},
		{`{"regexp":"a(?!b)","into":"b"}`, "invalid or unsupported Perl syntax: `\\(\\?!`; "},
		{`[{"regexp":"(","into":"b"}]`, `^rule 1: in "regexp": `},
		// A group that is not there
		{`{"regexp":"(.*)","into":"$1_x"}`, `\$1_x names the group "1_x", .*; write \$\{1\}_x, since`},
		{`{"regexp":"(?P<name>.*)","into":"$nameX"}`,
			`\$nameX names the group "nameX", .*; write \$\{name\}X, since`},
		{`{"regexp":"(.*)-(.*)","into":"${3}"}`,
			`\$\{3\} names .*; it has 2, one for each pair of parentheses$`},
		{`{"regexp":".*","into":"$1"}`, `\$1 names .*; it has 0, one for each pair of parentheses$`},
		{`{"regexp":"(.*)","into":"$01"}`, `\$01 names the group "01"`}, // for Expand that is a name
		{`{"regexp":"(.*)","into":"$1 $"}`,
			`the \$ at byte 4 of \$1 \$ names no group; write \$\$ for a dollar sign$`},
		// What is left of the unit of 2015 after today's systemd, and of a prefix in the
		// double quotes of a shell
		{`{regexp:(.*)\\..*\\.(.*)\\..*,into:$1.$2}`,
			`^it arrived without its double quotes, as \{regexp:.*: a shell or systemd removed them$`},
		{`{regexp:(.*)\..*,into:.}`, `^it arrived without its double quotes`},
		{`{"regexp":"\bweb\b","into":"$1"}`,
			`^there is a single backslash, which JSON takes for a control character, in .*: a shell ` +
				`or systemd removed the other one, or it was never there$`},
		// the last of a bash's brace expansion
		{`into:.`, `^it arrived without its double quotes, as into:\.: a shell or systemd removed them$`},
		{`--backstop=https://user:secret@h/publish/docker`,
			`^not a rule, and "?\(not shown, as it may hold a password\)"?; the form is `},
		{`{"regexp":"(.*)\..*","into":"$1"}`,
			`^there is a single backslash before byte 17 of .*: a shell or systemd removed `},
		{"{\"regexp\":\n\"(\",\"into\":\"\"}\n\n#", "^something follows"},
		{`{"regexp":"(.*)","into":"$host_x"}`,
			`\$host_x names the group "host_x", which the regexp does not have; write \$\{host\}_x, since`},
		{`{"regexp":"(.*)","into":"${hostname}.$1"}`,
			`names the group "hostname", which the regexp does not have; ` +
				`the host's name is \$\{host\}$`},
		// What a shell leaves of $1.$2 in double quotes
		{`{"regexp":"(.*)\\..*\\.(.*)","into":"."}`, `^"into" is only "\.", and no group is in ` +
			`it: a shell removed those, such as \$1, if the rule was in double quotes$`},
		{`{"regexp":"^(.*)$","into":""}`, `^"into" is only "", and no group is in it`},
		{`{"regexp":"^(.+)_(.+)_(\\d+)$","into":".."}`,
			`^"into" is only "\.\.", and no group is in it`},
		{`prefix_test.go`,
			`^not a rule, but the path of a file; put an @ before it .*: @prefix_test\.go$`},
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
		`{"regexp":"(_|-)+","into":"."}`, `{"regexp":"-.*","into":""}`,
		`{"regexp":"_(.+?)_","into":"."}`,
		`{"regexp":"(.*)-","into":""}`, `{"regexp":".*","into":"."}`,
		`{"regexp":"a","into":"b","category":""}`,
		" [ {\"regexp\" : \"a\" , \"into\" : \"b\"} ] \n",
	} {
		if _, err := parseRules(text); err != nil {
			t.Errorf("%s: %v", text, err)
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
		"[\n {\"regexp\": \"a\", \"drop\": 1}]": `: rule 1: "drop" is a JSON number ` +
			`instead of a bool`,
		"{regexp:a}": ": not JSON, at line 1, column 2: ",
		"[]":         ": the list has no rule in it; ",
		"5":          ": a JSON number instead of an object; ",
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
			!strings.HasSuffix(err.Error(), "give @ and the path of a file") {
			t.Errorf("@%s: %v", path, err)
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
	for _, form := range []string{quotedInShell, quotedInUnit, quotedAsVariable} {
		if !strings.Contains(names, form) {
			t.Errorf("docs/names.md lacks %s", form)
		}
	}
	if !strings.Contains(harness.ReadFile(t, "deploy/docker-stats-to-backstop.default"),
		quotedAsVariable) {
		t.Errorf("the file for the systemd unit lacks %s", quotedAsVariable)
	}
}
