package main

import (
	"regexp"
	"strings"
	"testing"
)

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
		var r rule
		if test.rule != "" {
			var err error
			if r, err = parseRule(test.rule); err != nil {
				t.Errorf("%s: %v", test.rule, err)
				continue
			}
		}
		if got := r.path(test.name); got != test.want {
			t.Errorf("%s makes %q of %q, want %q", test.rule, got, test.name, test.want)
		}
	}
}

func TestPathNodesFitIntoFileNames(t *testing.T) {
	if path := graphitePath("a\nroot.forged 1 2\n"); path != "a_root.forged_1_2_" {
		t.Errorf("a path that is two lines: %q", path)
	}
	if path := graphitePath(strings.Repeat(strings.Repeat("a", 250)+".", 70)); len(path) > 1024 || strings.HasSuffix(path, ".") {
		t.Errorf("a path of %d bytes", len(path))
	}
	path := graphitePath(strings.Repeat("a", 300) + "." + strings.Repeat("ü", 300))
	if want := strings.Repeat("a", 255) + "." + strings.Repeat("_", 255); path != want {
		t.Errorf("got nodes of %d bytes in all", len(path))
	}
}

// The errors are all there is between a user and a dashboard that stays empty: each has to
// say what is wrong and what to write instead, in one line.
func TestRuleRefusals(t *testing.T) {
	for _, test := range []struct{ rule, want string }{
		{`web`, `^not JSON, at byte 1 of web: .*; the form is \{"regexp":"…","into":"…"\}$`},
		{`{"regexp":"a","into":"b"`, `^the JSON ends too early: .*; the form is `},
		{`{"regexp":"a","into":"b"}}`, `^something follows the JSON object, at byte 26 of `},
		{`["a"]`, `^a JSON array where an object is wanted; the form is `},
		{`null`, `^the key "regexp" is missing; the form is `},
		{`{"into":"b"}`, `^the key "regexp" is missing; the form is `},
		{`{"regexp":"a"}`, `^the key "into" is missing; the form is `},
		{`{"regexp":"a","into":"b","inot":"c"}`, `^unknown field "inot"; the keys are "regexp" and "into"$`},
		{`{"regexp":1,"into":"b"}`, `^"regexp" is a JSON number where a string is wanted; the form is `},
		{`{"regexp":"a(","into":"b"}`, "^error parsing regexp: missing closing \\): `a\\(`; the syntax is that of https://"},
		// A group that is not there
		{`{"regexp":"(.*)","into":"$1_x"}`, `\$1_x names the group "1_x", .*; write \$\{1\}_x, since`},
		{`{"regexp":"(?P<name>.*)","into":"$nameX"}`, `\$nameX names the group "nameX", .*; write \$\{name\}X, since`},
		{`{"regexp":"(.*)","into":"$2"}`, `\$2 names the group "2", .*; the regexp has one group, \$1$`},
		{`{"regexp":"(.*)-(.*)","into":"${3}"}`, `\$\{3\} names .*; the regexp has 2 groups, \$1 to \$2$`},
		{`{"regexp":".*","into":"$1"}`, `\$1 names .*; the regexp has no groups \(those are its parentheses\)$`},
		{`{"regexp":"(.*)","into":"$01"}`, `\$01 names the group "01"`}, // for Expand that is a name
		{`{"regexp":"(.*)","into":"$1 $"}`, `the \$ at byte 4 of \$1 \$ names no group; write \$\$ for a dollar sign$`},
		// What is left of the unit of 2015 after today's systemd, and of a prefix in the
		// double quotes of a shell
		{`{regexp:(.*)\\..*\\.(.*)\\..*,into:$1.$2}`, `^it arrived without its double quotes, as \{regexp:.*: systemd or a shell took them out; put the whole of it in single quotes; .*'--prefix=\{"regexp":"\(\.\*\)\\\\\\\\\.\.\*.*`},
		{`{regexp:(.*)\..*,into:.}`, `^it arrived without its double quotes`},
		{`{"regexp":"\bweb\b","into":"$1"}`, `^it arrived with a single backslash, which JSON takes for a control character, in .*; put the whole of it in single quotes; `},
		{`into:.`, `^it arrived without its double quotes, as into:\.: systemd or a shell took them out; `}, // the last of a bash's brace expansion
		{`--backstop=https://user:secret@h/publish/docker`, `^not a rule, and "?\(not shown, as it may hold a password\)"?; the form is `},
		{`{"regexp":"(.*)\..*","into":"$1"}`, `^it arrived with a single backslash, .*; put the whole of it in single quotes; `},
		{"{\"regexp\":\n\"(\",\"into\":\"\"}\n\n#", "^something follows"},
	} {
		_, err := parseRule(test.rule)
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
