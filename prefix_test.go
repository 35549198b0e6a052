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

// renaming is the rule that --prefix={"regexp":…,"into":…} is.
func renaming(re *regexp.Regexp, into string) rules {
	return rules{{from: "name", regexp: re, into: into, rename: true}}
}

func mustRules(t testing.TB, text string) rules {
	t.Helper()
	if text == "" {
		return nil
	}
	rs, err := parseRules(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return rs
}

func TestRuleMakesPaths(t *testing.T) {
	const documented = `{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}`
	for _, test := range []struct{ rule, name, want string }{
		{"", "web", "web"},
		{"", "my.container.name.x", "my.container.name.x"},
		{documented, "my.container.name.x", "my.name"},
		{documented, "a.b.my.container.name.x", "a.b.my.name"},
		{documented, "web", "web"}, // no match: as it is
		{documented, "shop.web", "shop.web"},
		{`{"regexp":"_","into":"."}`, "shop_web_1", "shop.web.1"}, // every match
		{`{"regexp":"^(?P<project>[^-]+)-(.+)$","into":"${project}.$2"}`, "shop-web-1", "shop.web-1"},
		{`{"regexp":"^(.*)$","into":"${1}_x"}`, "web", "web_x"},
		{`{"regexp":"\\.[^.]*$","into":""}`, "web.1.x8f0", "web.1"},
		{`{"regexp":"x","into":"$$"}`, "x1", "_1"},
		{`{"regexp":".*","into":""}`, "web", "web"}, // nothing left: the container's own name
		{`{"regexp":".*","into":"..."}`, "web", "web"},
		// Whatever comes out, it is one safe path.
		{"", "a..b.", "a.b"},
		{"", ".hidden", "hidden"},
		{"", "...", "_"},
		{`{"regexp":".*","into":"a b;root.forged 1 2"}`, "web", "a_b_root.forged_1_2"},
		{`{"regexp":".*","into":"../../etc;tag=*{x}[é]"}`, "web", "_._etc_tag___x____"},
	} {
		if got := mustRules(t, test.rule).apply(subject{name: test.name}, "h").path; got != test.want {
			t.Errorf("%s makes %q of %q, want %q", test.rule, got, test.name, test.want)
		}
	}
}

func TestPathNodesFitIntoFileNames(t *testing.T) {
	if path := graphitePath("a\nroot.forged 1 2\n"); path != "a_root.forged_1_2_" {
		t.Errorf("a path that is two lines: %q", path)
	}
	if path := graphitePath(strings.Repeat(strings.Repeat("a", 250)+".", 70)); len(path) > 1024 ||
		strings.HasSuffix(path, ".") {
		t.Errorf("a path of %d bytes", len(path))
	}
	path := graphitePath(strings.Repeat("a", 300) + "." + strings.Repeat("ü", 300))
	if want := strings.Repeat("a", 255) + "." + strings.Repeat("_", 255); path != want {
		t.Errorf("got nodes of %d bytes in all", len(path))
	}
}

func TestRuleLists(t *testing.T) {
	web := subject{"shop_web_1", "0123456789abcdef", "registry:5000/shop/web:1.2", map[string]string{
		"monitoring": "on", "empty": "", "com.docker.compose.project": "shop",
		"com.docker.compose.service": "api.v2", "lines": "a\nb 1 2",
	}}
	for _, test := range []struct {
		rules string
		want  naming
	}{
		{`[{"regexp":"^x","into":"x"},{"regexp":"^shop_","into":"s."},{"regexp":"web","into":"w"}]`,
			naming{"s.web_1", 2, "", false}},
		{`[{"regexp":"^x","into":"x"}]`, naming{"shop_web_1", 0, "", false}},
		{`{"regexp":"web","category":"front"}`, naming{"shop_web_1", 1, "front", false}},
		{`{"regexp":"web","into":"w","category":"front end"}`, naming{"shop_w_1", 1, "front_end", false}},
		{`{"regexp":"web","drop":true}`, naming{"shop_web_1", 1, "", true}},
		// an exception
		{`[{"regexp":"web"},{"regexp":".*","into":"other"}]`, naming{"shop_web_1", 1, "", false}},
		// What the regexp sees
		{`{"from":"name","regexp":"^shop_(.*)$","into":"$1"}`, naming{"web_1", 1, "", false}},
		{`{"from":"image","regexp":"^.*/([^/:]+)(:.*)?$","into":"$1"}`, naming{"web", 1, "", false}},
		{`{"from":"id","regexp":"^(.{6}).*$","into":"c.$1"}`, naming{"c.012345", 1, "", false}},
		{`{"from":"label:monitoring","regexp":"^on$","into":"m.$0"}`, naming{"m.on", 1, "", false}},
		{`{"from":"label:monitoring","regexp":"^on$","category":"watched"}`,
			naming{"shop_web_1", 1, "watched", false}},
		{`[{"from":"label:other","regexp":"","into":"x"},{"regexp":"","category":"rest"}]`,
			naming{"shop_web_1", 2, "rest", false}},
		{`{"from":"label:empty","regexp":"^$","into":"x"}`, naming{"x", 1, "", false}}, // there, if empty
		{`{"from":"label:lines","regexp":"^.*$","into":"x"}`, naming{"shop_web_1", 0, "", false}},
		{`{"from":"label:lines","regexp":"(?s)^(.*)$","into":"$1"}`, naming{"a_b_1_2", 1, "", false}},
		// What into has beside groups
		{`{"regexp":"(.*)","into":"${host}.$1"}`, naming{"vm_test.shop_web_1", 1, "", false}},
		{`{"regexp":"(.*)","into":"$host.$1"}`, naming{"vm_test.shop_web_1", 1, "", false}},
		{`{"regexp":"(.*)","into":"$${host}.$1"}`, naming{"__host_.shop_web_1", 1, "", false}},
		{`{"regexp":"^(?P<host>[^_]*).*$","into":"${host}.$host"}`, naming{"shop.shop", 1, "", false}},
		{`{"regexp":"^.*$",` +
			`"into":"${label:com.docker.compose.project}.${label:com.docker.compose.service}"}`,
			naming{"shop.api_v2", 1, "", false}},
		{`{"regexp":"^.*$","into":"${label:lines}"}`, naming{"a_b_1_2", 1, "", false}},
		{`[{"regexp":"^.*$","into":"${label:missing}"},{"regexp":"^.*$","into":"x"}]`,
			naming{"x", 2, "", false}},
	} {
		if got := mustRules(t, test.rules).apply(web, "vm.test"); got != test.want {
			t.Errorf("%s makes %+v, want %+v", test.rules, got, test.want)
		}
	}
}

// Whatever goes in, one safe path comes out.
func FuzzPath(f *testing.F) {
	f.Add(`{"regexp":"(.*)\\..*","into":"$1.${host}.${label:l}"}`, "my.container.name.x",
		"registry/web:1", "label\nroot.forged 1 2", "host.example")
	f.Add(`[{"from":"image","regexp":"/","into":".."},{"from":"label:l","regexp":"(?s)(.*)",`+
		`"into":"$1$$$1"}]`, "../../etc", "a;b=*{}[]", "é\x00", "")
	f.Add(`{"from":"id","regexp":"","into":"."}`, "", "", "", "..")
	node := regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}$`)
	f.Fuzz(func(t *testing.T, text, name, image, label, host string) {
		if strings.HasPrefix(text, "@") {
			return
		}
		rs, err := parseRules(text)
		if err != nil {
			if strings.Contains(err.Error(), "\n") || err.Error() == "" {
				t.Errorf("%q: the error %q", text, err)
			}
			rs = nil
		}
		n := rs.apply(subject{name, "0123456789ab", image, map[string]string{"l": label}}, host)
		for part := range strings.SplitSeq(n.path, ".") {
			if !node.MatchString(part) {
				t.Errorf("%q makes %q of %q, %q, %q on %q", text, n.path, name, image, label, host)
			}
		}
		if len(n.path) > maxPath || !isGraphitePath(n.path) || n.category != "" &&
			!node.MatchString(n.category) {
			t.Errorf("%q makes %+v", text, n)
		}
	})
}

// A label of megabytes costs what its first kilobyte does.
func TestHugeLabelsCostNoMore(t *testing.T) {
	rs := mustRules(t, `[{"from":"label:l","regexp":"(a+)+$","into":"$1.${label:l}"},`+
		`{"from":"image","regexp":"^x.*x","into":"${label:l}"},{"regexp":"a","into":"b"}]`)
	apply := func(size int) func(*testing.B) {
		text := strings.Repeat("a", size)
		s := subject{text, "0123456789ab", text, map[string]string{"l": text}}
		return func(b *testing.B) {
			for b.Loop() {
				rs.apply(s, "h")
			}
		}
	}
	small, huge := testing.Benchmark(apply(1<<10)), testing.Benchmark(apply(4<<20))
	if huge.NsPerOp() > 10*small.NsPerOp() || huge.AllocedBytesPerOp() > 2*small.AllocedBytesPerOp() {
		t.Errorf("4 MB cost %s and %s, 1 KB %s and %s", huge, huge.MemString(), small, small.MemString())
	}
	got := rs.apply(subject{name: strings.Repeat("x", 4<<20)}, "h").path
	if want := strings.Repeat("x", maxNode); got != want {
		t.Errorf("a path of %d bytes", len(got))
	}
}

// Reading the rules of --prefix.

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
		{`[{"regexp":"x","into":"b"},{"regexp":".*","into":"b"},{"from":"image","regexp":"a",` +
			`"into":"c"}]`, `^rule 3: it can never be reached: rule 2 matches everything it sees; put it ` +
			`behind this one$`},
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
			`^it arrived without its double quotes, as \{regexp:.*: systemd or a shell removed them; ` +
				`put the whole of it in single quotes; .*'--prefix=\{"regexp":"\(\.\*\)\\\\\\\\\.\.\*.*`},
		{`{regexp:(.*)\..*,into:.}`, `^it arrived without its double quotes`},
		{`{"regexp":"\bweb\b","into":"$1"}`,
			`^there is a single backslash, which JSON takes for a control character, in .*: systemd ` +
				`or a shell removed it, or it was never there; put the whole of it in single quotes; `},
		// the last of a bash's brace expansion
		{`into:.`, `^it arrived without its double quotes, as into:\.: systemd or a shell removed them` +
			`; `},
		{`--backstop=https://user:secret@h/publish/docker`,
			`^not a rule, and "?\(not shown, as it may hold a password\)"?; the form is `},
		{`{"regexp":"(.*)\..*","into":"$1"}`,
			`^there is a single backslash before byte 17 of .*; put the whole of it in single quotes; `},
		{"{\"regexp\":\n\"(\",\"into\":\"\"}\n\n#", "^something follows"},
		{`{"regexp":"(.*)","into":"$host_x"}`,
			`\$host_x names the group "host_x", which the regexp does not have; write \$\{host\}_x, since`},
		{`{"regexp":"(.*)","into":"${hostname}.$1"}`,
			`names the group "hostname", which the regexp does not have; ` +
				`the host's name is \$\{host\}$`},
		// What a shell leaves of $1.$2 in double quotes
		{`{"regexp":"(.*)\\..*\\.(.*)","into":"."}`, `^"into" is only "\.", and no group is in ` +
			`it: a shell removed those, such as \$1, if the rule was in double quotes; ` +
			`put the whole of it in single`},
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

func TestMatchesAll(t *testing.T) {
	for pattern, want := range map[string]bool{
		"": true, ".*": true, "(.*)": true, "^.*$": true, "^(.*)$": true, ".+": true, "^(.+)$": true,
		"a": false, "^$": false, "^a*$": false, ".*a": false, "^.+a": false, "(.*)\\.(.*)": false,
		"..*": false, "^web": false,
	} {
		if got := matchesAll(pattern); got != want {
			t.Errorf("%s matches every name: %t", pattern, got)
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
