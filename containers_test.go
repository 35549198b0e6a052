package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// censusOf takes over a list of containers whose images are known.
func censusOf(cs *containers, list []listed, host string) *census {
	cs.remember(list)
	cs.apply(host)
	return cs.share()
}

// Two containers with one path would overwrite each other: the one that has had it keeps it, and
// when it goes, the other takes over.
func TestCollisions(t *testing.T) {
	const leftOut = `level=WARN msg="container left out: another one has the same name ` +
		`in its metrics; --prefix can tell them apart" `
	log := &harness.Log{}
	c := &containers{log: log.Logger(), rules: renaming(regexp.MustCompile(`-\d$`), "")}
	entry := func(name string, created int64) listed {
		return listed{ID: name, Names: []string{"/" + name}, Created: created}
	}
	for _, test := range []struct {
		why        string
		list       []listed
		asked      string
		collisions int
		log        string
	}{
		{"at first it is the oldest",
			[]listed{entry("web-3", 30), entry("web-2", 20), entry("db-1", 50)},
			"web-2 db-1", 1, leftOut + "container=web-3 other=web-2 metrics=web\n"},
		{"once is enough to say it", []listed{entry("web-3", 30), entry("web-2", 20)},
			"web-2", 1, ""},
		{"then it is the one that has it",
			[]listed{entry("web-1", 10), entry("web-2", 20)},
			"web-2", 1, leftOut + "container=web-1 other=web-2 metrics=web\n"},
		{"until it goes", []listed{entry("web-1", 10)}, "web-1", 0,
			"level=INFO msg=\"container can be read again\" container=web-1\n"},
	} {
		found := censusOf(c, test.list, "h")
		for _, known := range append(found.asked, found.left...) {
			c.report(known, known.err)
		}
		asked, collisions := found.asked, len(found.left)
		var names []string
		for _, known := range asked {
			names = append(names, known.name)
		}
		if got := strings.Join(names, " "); got != test.asked || collisions != test.collisions {
			t.Errorf("%s: asked %s, %d collisions", test.why, got, collisions)
		}
		if got := log.Take(); got != test.log {
			t.Errorf("%s: logged %s", test.why, got)
		}
	}
}

// An image's name that another image has by now is looked up, once, and where a rule wants it.
func TestImages(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	var list []map[string]any
	if err := json.Unmarshal(r.Read("containers.json"), &list); err != nil {
		t.Fatal(err)
	}
	for _, listed := range list {
		if name := fmt.Sprint(listed["Names"]); name == "[/fx-idle]" || name == "[/fx-two]" {
			listed["Image"] = "33b9f1857b34"
		}
	}
	body, _ := json.Marshal(list)
	r.On("/containers/json", harness.AnswerWith(200, string(body)))
	r.On("/containers/fx-two/json", harness.AnswerWith(500, `{"message":"busy"}`))
	r.On("/containers/fx-web/stats", r.Serve("stats-one-shot-idle.json"))
	r.On("/containers/fx-web/json", r.Serve("inspect-idle.json"))
	inspected := func() (names []string) {
		for _, question := range r.Questions() {
			if name, ok := strings.CutSuffix(question, "/json"); ok && name != "/containers" {
				names = append(names, strings.TrimPrefix(name, "/containers/"))
			}
		}
		return names
	}

	c, log := collecting(t, r.URL, 10*time.Second)
	c.containers.rules = mustRules(t, `[{"from":"image","regexp":"^bb$","into":"made.of.$0.${label:none}"},`+
		`{"from":"image","regexp":"^bb$","category":"bb"},`+
		`{"from":"image","regexp":"","category":"other"}]`)
	first := c.sweep(t.Context())
	idle, two := c.containers.holders["fx-idle"].category, c.containers.holders["fx-two"]
	if first.failed != 1 || idle != "bb" || two != nil {
		t.Errorf("%d failed, %s, %v", first.failed, idle, two)
	}
	if got, want := log.Take(), `level=ERROR msg="container cannot be read" container=fx-two `+
		`error="its image: API error (500): busy"`; strings.Count(got, want) != 1 {
		t.Errorf("logged %s", got)
	}
	if lines := asLines(first.metrics); !strings.Contains(lines, "vmtest.containers.bb 5 ") ||
		!strings.Contains(lines, "vmtest.containers.other 0 ") ||
		!strings.Contains(lines, "vmtest.containers.total 6 ") {
		t.Errorf("figures\n%s", lines)
	}
	c.sweep(t.Context())
	if got := log.Take(); strings.Contains(got, "fx-two") {
		t.Errorf("logged again: %s", got)
	}
	inspected()
	r.On("/containers/fx-two/json", nil)
	for range 2 {
		got := c.sweep(t.Context())
		two := c.containers.holders["fx-two"]
		if got.failed != 0 || two.category != "bb" {
			t.Errorf("%d failed, %+v", got.failed, two)
		}
	}
	// Once, for the image and the uptime
	isOther := func(name string) bool { return name != "fx-two" && name != "fx-idle" }
	got := slices.DeleteFunc(inspected(), isOther)
	if !slices.Equal(got, []string{"fx-two"}) {
		t.Errorf("inspected %q", got)
	}
	const again = `level=INFO msg="container can be read again" container=fx-two`
	if got := log.Take(); strings.Count(got, again) != 1 {
		t.Errorf("logged %s", got)
	}

	// Nobody looks at it.
	c, _ = collecting(t, r.URL, 10*time.Second)
	r.On("/containers/fx-two/json", harness.AnswerWith(500, `{}`))
	if found, err := c.survey(t.Context()); err != nil || len(found.left) != 0 ||
		len(inspected()) != 0 {
		t.Errorf("%v, %v", found.left, err)
	}
}

// Inspect is asked of containers that may have been started since the last time, and only of
// those.
func TestInspectOnlyAfterAStart(t *testing.T) {
	known, seen := new(container), new(inspected)
	seen.State.Running = true
	asks := func(cpu uint64) bool {
		stale := known.isStale(counted(cpu), true)
		if stale {
			known.learn(seen)
		}
		known.last = &cpuSample{total: cpu}
		return stale
	}
	for i, test := range []struct {
		cpu  uint64
		want bool
	}{{5, true}, {6, false}, {6, false}, {2, true}, {3, false}} {
		if got := asks(test.cpu); got != test.want {
			t.Errorf("%d: inspected %t", i, got)
		}
	}
	known.checkedAt = known.checkedAt.Add(-refresh - time.Second)
	if !asks(9) || asks(9) {
		t.Error("nobody asks for a day, or asks again")
	}
	if known.last = nil; known.isStale(count{}, true) {
		t.Error("it is asked because nothing is known of its CPU time")
	}
}

// Fields that nobody here uses, and those that are broken, cost at most themselves.
func TestWhatIsBrokenCostsItself(t *testing.T) {
	for _, test := range []struct {
		why, entry, inspect string
		want                []string
	}{
		{"ports that are no numbers", `"Ports":[{"PrivatePort":"all"}]`, smallInspect,
			[]string{"web.uptime 60", "web.restarts 3"}},
		{"labels that are none", `"Labels":[1]`, smallInspect, []string{"web.uptime 60"}},
		{"a label that is a number", `"Labels":{"a":1,"b":"x"}`, smallInspect,
			[]string{"web.uptime 60"}},
		{"a time of making that is text", `"Created":"yesterday"`, smallInspect,
			[]string{"web.uptime 60"}},
		{"a name that is a number", `"Names":[1,"/web"]`, smallInspect, []string{"web.uptime 60"}},
		{"all that is not used", `"Ports":1,"Mounts":"","HostConfig":[],"NetworkSettings":0`,
			smallInspect, []string{"web.uptime 60"}},
		{"a health that is text", `"Health":"good"`, smallInspect,
			[]string{"web.uptime 60", "!web.health"}},
		{"no start", ``, caseOf(t, "inspect_volumes.json"),
			[]string{"web.restarts 3", "!web.uptime", "web.memory.usage 1"}},
		{"weights that are numbers", ``, `{"State":{"Running":true,` +
			`"StartedAt":"2026-01-01T00:00:00Z"},"RestartCount":3,"HostConfig":` +
			`{"NanoCpus":500000000,"BlkioWeightDevice":[{"Path":"/dev/sda","Weight":200}]}}`,
			[]string{"web.restarts 3", "web.uptime 60", "web.cpu.limit 0.5"}},
		{"a state that is text", ``, `{"State":"running","RestartCount":3}`,
			[]string{"web.restarts 3", "!web.uptime"}},
		{"a start of a board without a clock", ``,
			`{"State":{"Running":true,"StartedAt":"1970-01-01T00:00:09Z"},"RestartCount":3}`,
			[]string{"web.restarts 3", "!web.uptime"}},
	} {
		entry := `"Id":"1","Names":["/web"],"State":"running","Status":"Up 1 second"`
		if test.entry != "" {
			entry += "," + test.entry
		}
		s, c, log := newSmall(t, "[{"+entry+"}]")
		s.container("1", test.inspect, smallStats)
		result := c.sweep(t.Context())
		wants(t, test.why, result, test.want...)
		if got := log.Take(); result.failed != 0 || strings.Contains(got, "level=ERROR") {
			t.Errorf("%s: %d failed, logged %s", test.why, result.failed, got)
		}
	}
}

// An entry of the list that is broken costs itself.
func TestBrokenEntries(t *testing.T) {
	s, c, log := newSmall(t, `[{"Names":["/lost"]},7,null,{"Id":"1","Names":["/web"]}]`)
	s.container("1", smallInspect, smallStats)
	for range 2 {
		wants(t, "broken entries", c.sweep(t.Context()), "web.uptime 60", "h.metrics.failed 0",
			"h.metrics.sampled 1", "h.containers.total 1")
	}
	if got := log.Take(); strings.Contains(got, "level=ERROR") {
		t.Errorf("logged %s", got)
	}
	// One that would ask for another path, or for much memory, is none.
	for _, id := range []string{".", "..", "a/b", "a%2fb", "a?b", strings.Repeat("a", 129)} {
		s.answers["/containers/json"] = `[{"Id":"` + id + `","Names":["/odd"]}]`
		if result := c.sweep(t.Context()); result.running != 0 {
			t.Errorf("%.10s is taken for an id", id)
		}
	}
	s.answers["/containers/json"] = strings.ReplaceAll(caseOf(t, "list_ports_all.json"),
		`"Id": ""`, `"Id": "1"`)
	if result := c.sweep(t.Context()); result.err != nil || result.running != 1 {
		t.Errorf("%v, %d run", result.err, result.running)
	}
}

// Where the list has no name that is the container's own, the end of another one is taken. An entry
// without any is being made, renamed or removed: no series is made of its id.
func TestNamesThatAreNone(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for names, want := range map[string]string{
		`["/web"]`:                 "web",
		`["web"]`:                  "web", // Podman's stats have them so
		`["/shop/db","/postgres"]`: "postgres",
		`["/node-1/web"]`:          "web",
		`null`:                     "", `[]`: "", `[""]`: "", `["/"]`: "", `["/node-1/"]`: "",
	} {
		s, c, _ := newSmall(t, `[{"Id":"`+id+`","Names":`+names+`}]`)
		s.container(id, smallInspect, smallStats)
		result := c.sweep(t.Context())
		if want == "" {
			wants(t, names, result, "!0123", "!_.", "h.containers.total 0", "h.metrics.failed 0")
			continue
		}
		wants(t, names, result, want+".uptime 60", "h.metrics.sampled 1", "h.metrics.failed 0")
		table, ok, err := check(t.Context(), c)
		if !ok || err != nil || !strings.Contains(table, "\n"+want+" ") {
			t.Errorf("%s: %t, %v\n%s", names, ok, err, table)
		}
		s.answers["/containers/json"] = `[{"Id":"` + id + `","Names":[]}]` // it is renamed
		wants(t, names+", then none", c.sweep(t.Context()), want+".uptime 60")
	}
}

// A container that is restarted again and again has few metrics and one line in the log.
func TestCrashLoop(t *testing.T) {
	entry := func(state, status string) string {
		return `[{"Id":"1","Names":["/loop"],"State":"` + state + `","Status":"` + status + `"}]`
	}
	restarting := caseOf(t, "inspect_restarting.json")
	waits := entry("restarting", "Restarting (1) 3 seconds ago")
	s, c, log := newSmall(t, waits)
	sweep := func(why, list, inspect, stats string, want ...string) string {
		t.Helper()
		s.answers["/containers/json"] = list
		s.container("1", inspect, stats)
		result := c.sweep(t.Context())
		if result.failed != 0 {
			t.Errorf("%s: it failed", why)
		}
		wants(t, why, result, want...)
		return log.Take()
	}
	zero := caseOf(t, "zero_read.json")
	got := sweep("at first", waits, restarting, zero, "loop.restarts 57", "!loop.uptime",
		"!loop.memory", "h.containers.total 1", "h.containers.stopped 1", "h.containers.running 0",
		"h.metrics.sampled 1")
	if !strings.Contains(got, `level=WARN msg="container is in a restart loop" `+
		`container=loop restarts=57 exit_code=1`) {
		t.Errorf("at first it logged %s", got)
	}
	again := strings.Replace(restarting, "57", "58", 1)
	up := entry("running", "Up Less than a second")
	young := strings.Replace(smallStats, "00:01:00", "00:00:59", 1)
	got = sweep("up for a moment", up, smallInspect, young, "loop.restarts 3", "loop.uptime 59")
	got += sweep("down between list and stats", up, again, zero, "loop.restarts 58", "!loop.uptime")
	got += sweep("gone for a moment", up, `{"State":{"Running":false}}`, zero, "!loop.")
	got += sweep("waiting", waits, again, zero, "loop.restarts 58")
	got += sweep("waiting, of an old engine", `[{"Id":"1","Names":["/loop"],`+
		`"Status":"Restarting (1) 3 seconds ago"}]`, again, zero, "loop.restarts 58")
	got += sweep("up when it was asked", waits, smallInspect, young, "loop.uptime 59")
	if got != "" {
		t.Errorf("later it logged %s", got)
	}
	got = sweep("up for good", entry("running", "Up 2 minutes"), smallInspect, smallStats,
		"loop.uptime 60")
	if got != "level=INFO msg=\"container stays up again\" container=loop\n" {
		t.Errorf("up for good it logged %s", got)
	}
}

// Health is told by the list, in two ways, or by inspect alone.
func TestHealth(t *testing.T) {
	inspect := func(health string) string {
		return `{"State":{"Running":true,"StartedAt":"2026-01-01T00:00:00Z","Health":{"Status":"` +
			health + `"}}}`
	}
	for _, test := range []struct {
		why, entry, inspect, want string
		asks                      int // of two sweeps
	}{
		{"Docker", `"Status":"Up 2 hours (healthy)"`, inspect("healthy"), "web.health 1", 1},
		{"Docker, unhealthy", `"Status":"Up 2 hours (unhealthy)"`, inspect("unhealthy"),
			"web.health 0", 1},
		{"Docker, starting", `"Status":"Up 2 hours (health: starting)"`, inspect("starting"),
			"!web.health", 1},
		{"Docker, paused", `"Status":"Up 2 hours (Paused)"`, inspect("healthy"), "web.health 1", 2},
		{"API 1.52", `"Status":"Up 2 hours","Health":{"Status":"unhealthy","FailingStreak":3}`,
			inspect("unhealthy"), "web.health 0", 1},
		{"API 1.52, none", `"Status":"Up 2 hours","Health":{"Status":"none"}`, inspect("none"),
			"!web.health", 1},
		{"Podman 4", `"Status":"Up 2 hours"`, inspect("unhealthy"), "web.health 0", 2},
		{"Podman 4, none", `"Status":"Up 2 hours"`, inspect(""), "!web.health", 1},
		{"Podman 4, starting", `"Status":"Up 2 hours"`, inspect("starting"), "!web.health", 2},
	} {
		s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"],`+test.entry+`}]`)
		s.container("1", test.inspect, smallStats)
		asked, handler := 0, s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/containers/1/json" {
				asked++
			}
			handler.ServeHTTP(w, r)
		})
		for range 2 {
			wants(t, test.why, c.sweep(t.Context()), test.want)
		}
		if asked != test.asks {
			t.Errorf("%s: inspect was asked %d times, want %d", test.why, asked, test.asks)
		}
	}
}
