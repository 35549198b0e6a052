package main

import (
	"regexp"
	"strings"
	"testing"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
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
		if got := mustRules(t, test.rule).apply(subject{name: test.name}, "h").path; got != test.want {
			t.Errorf("%s makes %q of %q, want %q", test.rule, got, test.name, test.want)
		}
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
