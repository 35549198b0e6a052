package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
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

// An engine's clock can be set back while it runs. A restart shows at the next poll, whether
// /events is refused or not, and whatever else is compared with a time goes on.
func TestClockThatIsSetBack(t *testing.T) {
	for _, back := range []time.Duration{time.Hour, 24 * time.Hour, time.Second, -time.Hour} {
		for _, refused := range []bool{false, true} {
			why := fmt.Sprintf("back by %s, /events refused %t", back, refused)
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(noClock) + 48*time.Hour)
				ahead, past := time.Duration(0), &pastEvents{refused: refused}
				now := func() time.Time { return time.Now().Add(ahead).UTC() }
				started, restarts, cpu := now().Add(-10*time.Minute), 0, 5e9
				c, log := collecting(t, "http://engine.test", maxCall)
				c.engine.client.HTTPClient.Transport = inBubble(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Date", now().Format(http.TimeFormat))
					switch r.URL.Path {
					case "/info":
						io.WriteString(w, `{"Name":"h"}`)
					case "/containers/json":
						io.WriteString(w, `[{"Id":"1","Names":["/web"],"Status":"Up 10 minutes"}]`)
					case "/containers/1/stats":
						fmt.Fprintf(w, `{"read":%q,"cpu_stats":{"cpu_usage":{"total_usage":%.0f}}}`,
							now().Format(time.RFC3339Nano), cpu)
					case "/containers/1/json":
						fmt.Fprintf(w, `{"State":{"Running":true,"StartedAt":%q},"RestartCount":%d}`,
							started.Format(time.RFC3339Nano), restarts)
					case "/events":
						past.ServeHTTP(w, r)
					}
				})
				polls := func(what string, lines ...string) {
					t.Helper()
					wants(t, why+", "+what, c.sweep(t.Context()), append(lines, "h.metrics.failed 0")...)
					time.Sleep(30 * time.Second)
					cpu += 15e9
				}
				polls("at first", "web.uptime 600", "web.restarts 0", "!web.cpu.percent")
				polls("later", "web.uptime 630", "web.cpu.percent 50")
				ahead -= back
				age := func(age time.Duration) string { // what is not known is as it was
					if age -= back; age < 0 {
						age = 630 * time.Second
					}
					return fmt.Sprintf("web.uptime %.0f", age.Seconds())
				}
				polls("set back", age(660*time.Second), "web.restarts 0")
				polls("then", age(690*time.Second), "web.restarts 0", "web.cpu.percent 50")
				started, restarts = now().Add(-7*time.Second), 1
				past.add("1", "die", `"name":"web","exitCode":"1"`, started.Add(-time.Second))
				past.add("1", "start", `"name":"web"`, started)
				polls("restarted", "web.uptime 7", "web.restarts 1", "!web.cpu.percent")
				polls("after that", "web.uptime 37", "web.restarts 1", "web.cpu.percent 50")
				if !refused {
					polls("counted", "web.failed_exits 1", "h.events.die_nonzero 1", "h.events.start 1")
				}
				if got := log.Take(); strings.Contains(got, "level=ERROR") {
					t.Errorf("%s: it logged %s", why, got)
				}
			})
		}
	}
}

// What is known is sent, whatever stats answers: one line, and failed 1.
func TestWhatIsKnownIsSent(t *testing.T) {
	const inspect = `{"State":{"Running":true,"StartedAt":"2026-01-01T00:00:00Z",` +
		`"Health":{"Status":"unhealthy"}},"RestartCount":3,"HostConfig":{"NanoCpus":1500000000}}`
	known := []string{"web.restarts 3", "web.health 0", "web.cpu.limit 1.5", "!web.memory",
		"!web.cpu.total", "h.metrics.failed 1", "h.metrics.sampled 0", "h.containers.total 1"}
	for why, answer := range map[string]http.HandlerFunc{
		"409":       harness.AnswerWith(409, `{"message":"busy"}`),
		"500":       harness.AnswerWith(500, `{}`),
		"403":       harness.AnswerWith(403, `no`),
		"429":       harness.AnswerWith(429, `later`),
		"400":       harness.AnswerWith(400, `{"message":"bad parameter"}`),
		"404":       harness.AnswerWith(404, `{}`),
		"302":       harness.AnswerWith(302, ``),
		"zero read": harness.AnswerWith(200, caseOf(t, "zero_read.json")),
		"no read":   harness.AnswerWith(200, `{"message":"no metrics received"}`),
		"empty":     harness.AnswerWith(200, ``),
		"null":      harness.AnswerWith(200, `null`),
		"an array":  harness.AnswerWith(200, `[]`),
		"no JSON":   harness.AnswerWith(200, `<html>`),
		"broken":    harness.AnswerWith(200, `{"read":"2026-01-01T00:0`),
	} {
		for _, refused := range []bool{false, true} {
			town := newTown(t, "")
			town.past.refused = refused
			town.has(`1 web,"Status":"Up 3 weeks (unhealthy)"`)
			town.answers["/containers/1/json"] = inspect
			engine := func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Date", "Thu, 01 Jan 2026 00:02:00 GMT")
				if r.Body = http.NoBody; r.URL.Path == "/containers/1/stats" {
					answer(w, r)
					return
				}
				town.Config.Handler.ServeHTTP(w, r)
			}
			town.engine.client.HTTPClient.Transport = inBubble(engine)
			synctest.Test(t, func(t *testing.T) {
				town.t = t
				time.Sleep(time.Until(noClock)) // a bubble's clock begins in 2000
				for range 3 {
					town.polls(why, append(known, "web.uptime 120")...)
				}
				if n := strings.Count(town.log.Take(), "level=ERROR"); n != 1 {
					t.Errorf("%s: it logged %d errors", why, n)
				}
				town.answers["/containers/1/json"] = strings.Replace(inspect, ":3,", ":4,", 1)
				town.polls(why+", restarted", "web.restarts 4", "web.uptime 120")
				delete(town.answers, "/containers/1/json")
				town.polls(why+", and gone", "!web.restarts", "!web.uptime", "!web.cpu.limit", "!web.health")
			})
		}
	}
}

// In each poll, all that run are read, failed, left out, dropped, or have just ended, which one
// does once.
func TestTheSumsAddUp(t *testing.T) {
	list := func(state string) string {
		return `[{"Id":"1","Names":["/well"],"State":"` + state + `"},
			{"Id":"2","Names":["/sick"],"State":"running"},
			{"Id":"3","Names":["/gone"],"State":"running"},
			{"Id":"4","Names":["/web-1"],"State":"running","Created":4},
			{"Id":"5","Names":["/web-2"],"State":"running","Created":5},
			{"Id":"6","Names":["/secret"],"State":"running"},
			{"Id":"7","Names":["/loop"],"State":"restarting"},
			{"Id":"8","Names":["/paused"],"State":"paused"},
			{"Id":"9","Names":["/image"],"State":"running","Image":"sha256:33b9f1857b34"},
			{"Id":"10","Names":[],"State":"running"},
			{"Id":"","Names":["/x"],"State":"running"},
			{"Id":"11","Names":["/over"],"State":"exited"},
			{"Id":"12","Names":["/podman"],"State":"stopped"},
			{"Id":"13","Names":["/new"],"State":"created"}]`
	}
	s, c, log := newSmall(t, list("running"))
	c.containers.rules = mustRules(t, `[{"regexp":"^secret","drop":true},`+
		`{"regexp":"^web-\\d$","into":"web"},{"regexp":"^redis","from":"image","into":"redis"}]`)
	for _, id := range []string{"1", "2", "4", "5", "6", "8"} {
		s.container(id, smallInspect, smallStats)
	}
	s.answers["/containers/2/stats"] = "[]"
	s.container("7", `{"State":{"Running":true,"Restarting":true},"RestartCount":9}`, ``)
	s.answers["/containers/9/json"] = "[]" // without its image, no rule can be applied
	for poll, ended := range []int{1, 0, 0, 0} {
		if poll == 2 {
			s.answers["/containers/json"] = list("stopping") // as Podman says of one that still runs
		}
		result := c.sweep(t.Context())
		wants(t, fmt.Sprint("poll ", poll), result, "h.containers.total 9", "h.containers.running 7",
			"h.containers.paused 1", "h.containers.stopped 4", "h.metrics.sampled 4",
			fmt.Sprintf("h.metrics.failed %d", 3-ended), "h.metrics.collisions 1", "well.uptime 60",
			"paused.uptime 60", "web.uptime 60", "loop.restarts 9", "!gone.", "!over.", "!podman.",
			"!image.", "!secret.", "sick.restarts 3", "!sick.memory")
		const dropped = 1
		if sum := result.sampled + result.failed + result.collisions + dropped + ended; sum != 9 {
			t.Errorf("poll %d: the sum is %d", poll, sum)
		}
	}
	got := log.Take()
	for _, line := range []string{`container=gone error="the engine's list has it, poll after poll`,
		`container=sick error="its stats answer is not what was asked for: an array instead of an`,
		`container=image error="its image: the answer is not what was asked for: an array instead of`} {
		if strings.Count(got, line) != 1 {
			t.Errorf("not once %s in\n%s", line, got)
		}
	}
	if n := strings.Count(got, "level=ERROR"); n != 3 {
		t.Errorf("%d errors in\n%s", n, got)
	}
	s.container("3", smallInspect, smallStats)
	wants(t, "found", c.sweep(t.Context()), "gone.uptime 60", "h.metrics.failed 2",
		"h.metrics.sampled 5")
	if got := log.Take(); got != "level=INFO msg=\"container can be read again\" container=gone\n" {
		t.Errorf("it logged %s", got)
	}
}

// An image that is only an id has no name: rules on images do not see it.
func TestImagesThatAreIDs(t *testing.T) {
	const id = "33b9f1857b3433b9f1857b3433b9f1857b3433b9f1857b3433b9f1857b34aaaa"
	for image, path := range map[string]string{
		"sha256:" + id: "web", id: "web", id[:12]: "web", "sha256:" + id[:12]: "web", "": "web",
		"redis": "of.redis", "redis:7": "of.redis_7", "redis@sha256:" + id: "of.redis_sha256_" + id,
		"deadbeef": "of.deadbeef", "localhost:5000/" + id[:12]: "of.localhost_5000_" + id[:12],
	} {
		s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Image":"`+image+`"}]`)
		c.containers.rules = mustRules(t,
			`{"regexp":"^(?P<image>.*)$","from":"image","into":"of.${image}"}`)
		config := `{"Config":{"Image":"` + image + `"},`
		s.container("1", strings.Replace(smallInspect, "{", config, 1), smallStats)
		for range 2 {
			wants(t, image, c.sweep(t.Context()), path+".uptime 60", "h.metrics.sampled 1")
		}
		if got := log.Take(); strings.Contains(got, "level=ERROR") {
			t.Errorf("%s: it logged %s", image, got)
		}
	}
}

// town is an engine whose containers come and go, and what it remembers of them.
type town struct {
	*small
	*collector
	t    *testing.T
	past *pastEvents
	log  *harness.Log
}

// newTown starts one, whose containers have their paths by these rules.
func newTown(t *testing.T, rules string) *town {
	t.Helper()
	s, c, log := newSmall(t, `[]`)
	c.containers.rules = mustRules(t, rules)
	town := &town{s, c, t, &pastEvents{}, log}
	handler := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			town.past.ServeHTTP(w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
	return town
}

// has makes these the containers that run: each is an id and a name, and maybe more for the list.
func (town *town) has(containers ...string) {
	var list []string
	for i, text := range containers {
		id, name, _ := strings.Cut(text, " ")
		name, more, _ := strings.Cut(name, ",")
		entry := fmt.Sprintf(`{"Id":%q,"Names":["/%s"],"Created":%d`, id, name, i)
		if more != "" {
			entry += "," + more
		}
		list = append(list, entry+"}")
		town.container(id, smallInspect, smallStats)
	}
	town.answers["/containers/json"] = "[" + strings.Join(list, ",") + "]"
}

// happens makes that happen to a container, just now.
func (town *town) happens(id, name, action, attributes string) {
	town.past.add(id, action, fmt.Sprintf(`"name":%q`, name)+attributes, time.Now())
}

// ends ends a container with an exit code.
func (town *town) ends(id, name string, code int, attributes ...string) {
	town.happens(id, name, "die", fmt.Sprintf(`,"exitCode":"%d"`, code)+strings.Join(attributes, ""))
}

// polls polls, and holds the metrics to lines as wants does.
func (town *town) polls(why string, lines ...string) sweepResult {
	town.t.Helper()
	result := town.sweep(town.t.Context())
	wants(town.t, why, result, lines...)
	return result
}

// OOM kills and failed exits go on by path, whichever container has it, and begin with 0.
func TestEnds(t *testing.T) {
	town := newTown(t, "")
	town.ends("1", "web", 1) // before the daemon's start
	town.has("1 web", "8 db")
	town.polls("at first", "web.oom_kills 0", "web.failed_exits 0", "db.failed_exits 0")

	town.happens("1", "web", "oom", "")
	town.ends("1", "web", 137)
	town.has("2 web", "8 db")
	town.polls("made anew under its name", "web.oom_kills 1", "web.failed_exits 1", "db.oom_kills 0",
		"db.failed_exits 0")
	town.polls("then nothing", "web.oom_kills 1", "web.failed_exits 1")
	town.ends("2", "web", 0)
	town.ends("8", "db", 3)
	town.polls("restarted by its policy", "web.failed_exits 1", "db.failed_exits 1")

	town.ends("3", "job", 4)
	town.polls("one that nobody has seen", "!job.", "web.failed_exits 1")
	town.has("2 web", "4 job", "8 db")
	town.polls("now it is seen", "job.failed_exits 0", "job.oom_kills 0")
	town.has("2 web", "8 db")
	town.ends("4", "job", 3)
	town.polls("the last point", "job.failed_exits 1", "job.oom_kills 0", "!job.uptime", "!job.memory")
	town.polls("no more points", "!job.")
	town.ends("5", "job", 3)
	town.ends("6", "job", 0)
	town.happens("7", "job", "oom", "")
	town.ends("7", "job", 137)
	town.polls("lived between two polls, thrice", "job.failed_exits 3", "job.oom_kills 1")
	town.polls("no more points again", "!job.")
	town.has("2 web", "9 job", "8 db")
	town.polls("it is back", "job.failed_exits 3", "job.oom_kills 1", "web.failed_exits 1")
	town.has("2 web", "8 db")
	town.ends("9", "job", 0)
	town.polls("it ends well", "!job.")
	for _, its := range town.containers.ends {
		its.seen = its.seen.Add(-endsKept - time.Second)
	}
	town.ends("10", "job", 1)
	town.polls("a day later", "!job.", "web.failed_exits 1")
	if _, kept := town.containers.ends["job"]; kept || len(town.containers.ends) != 2 {
		t.Errorf("it keeps %d", len(town.containers.ends))
	}
	if got := town.log.Take(); strings.Count(got, "\n") != 1 {
		t.Errorf("it logged %s", got)
	}
}

// What happens to a container without a path of its own counts for none.
func TestEndsOfThoseThatAreLeftOut(t *testing.T) {
	town := newTown(t, `[{"regexp":"^secret","drop":true},{"regexp":"^web-\\d$","into":"web"}]`)
	town.has("1 web-1", "2 web-2", "3 secret")
	first := town.polls("at first", "web.failed_exits 0", "!secret")
	if first.collisions != 1 {
		t.Errorf("%d collisions", first.collisions)
	}
	town.ends("2", "web-2", 1)
	town.ends("3", "secret", 1)
	town.ends("4", "secret-too", 1)
	town.ends("5", "web-3", 1) // it lived beside web-1
	town.polls("others", "web.failed_exits 0", "!secret")
	town.has("1 web-1")
	town.ends("2", "web-2", 1)
	town.polls("the one that was left out is gone", "web.failed_exits 0")
	town.has("1 web-1", "2 web-2")
	town.polls("it is back", "web.failed_exits 0")
	town.ends("1", "web-1", 1)
	town.has("2 web-2")
	town.polls("it takes over", "web.failed_exits 1")
	town.ends("2", "web-2", 1)
	town.polls("and is restarted", "web.failed_exits 2")
}

// Paths are those of the rules, be it by image, label, or the name of a task.
func TestEndsByRules(t *testing.T) {
	const labels = `"com.docker.compose.project":"shop","com.docker.compose.service":"web"`
	const compose = `{"regexp":"(.+)","from":"label:com.docker.compose.service",` +
		`"into":"${label:com.docker.compose.project}.$1"}`
	for why, test := range map[string]struct{ rule, entry, attributes, path string }{
		"labels": {compose, `"Labels":{` + labels + `}`, "," + labels, "shop.web"},
		"image": {`{"regexp":"^(\\w+):.*","from":"image","into":"of.$1"}`, `"Image":"redis:7"`,
			`,"image":"redis:7"`, "of.redis"},
		"a task": {`{"regexp":"^(\\w+)\\..*","into":"$1"}`, ``, ``, "task"},
		"none":   {``, ``, ``, "task"},
	} {
		of := func(n int) string {
			if why == "a task" { // each run has another name
				return fmt.Sprintf("task.%d.x%[1]d", n)
			}
			return "task"
		}
		town := newTown(t, test.rule)
		has := func(n int) { town.has(fmt.Sprintf("%d %s,%s", n, of(n), test.entry)) }
		has(1)
		town.polls(why, test.path+".failed_exits 0")
		town.ends("1", of(1), 1, test.attributes)
		has(2)
		town.polls(why+", made anew", test.path+".failed_exits 1")
		for n := range 3 {
			town.ends(fmt.Sprint(n+2), of(n+2), 1, test.attributes)
		}
		has(5)
		town.polls(why+", thrice between two polls", test.path+".failed_exits 4")
		town.has()
		town.ends("5", of(5), 1, test.attributes)
		town.polls(why+", gone", test.path+".failed_exits 5")
		town.ends("6", of(6), 1, test.attributes)
		town.polls(why+", there for a moment", test.path+".failed_exits 6")
		town.polls(why+", nothing", "!"+test.path)
	}
}

// While the host is not known, no path is made that would be another one with it.
func TestEndsOnAnUnknownHost(t *testing.T) {
	town := newTown(t, `{"regexp":"^app$","into":"${host}.web"}`)
	town.answers["/info"] = "<html>"
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("2", "app", 1)
	town.polls("without a host", "web.failed_exits 0")
	town.answers["/info"] = `{"Name":"h"}`
	town.has("1 web", "3 app")
	town.about.askedAt = time.Time{}
	town.polls("with a host")
	town.polls("with a host", "web.failed_exits 0", "h.web.failed_exits 0")
	town.ends("3", "app", 1)
	town.polls("with a host", "web.failed_exits 0", "h.web.failed_exits 1")
}

// Where /events is refused there are none; after that they go on.
func TestEndsWithoutEvents(t *testing.T) {
	town := newTown(t, "")
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("1", "web", 1)
	town.polls("one", "web.failed_exits 1")
	town.past.refused = true
	town.polls("refused", "!web.failed_exits", "!web.oom_kills", "!h.events.", "web.uptime 60")
	town.past.refused = false
	town.polls("well again", "web.failed_exits 1", "h.events.die 0")
	town.ends("1", "web", 2)
	town.polls("well again", "web.failed_exits 2", "h.events.die 1")
}

// A renamed container goes on under its new name, and one in a crash loop has little else.
func TestEndsOfOneThatIsRenamedOrLoops(t *testing.T) {
	town := newTown(t, "")
	town.has("1 web")
	town.polls("at first", "web.failed_exits 0")
	town.ends("1", "web", 1)
	town.polls("fails", "web.failed_exits 1")
	town.has("1 shop")
	town.polls("renamed", "!web.", "shop.failed_exits 0", "shop.uptime 60")
	town.ends("1", "shop", 1)
	town.answers["/containers/json"] = `[{"Id":"1","Names":[]}]` // it is renamed again
	town.polls("without a name", "!web.", "shop.failed_exits 1", "shop.uptime 60",
		"h.containers.total 1", "h.metrics.sampled 1")

	loops := `{"State":{"Running":true,"Restarting":true},"RestartCount":%d}`
	for n := range 3 {
		town.ends("1", "shop", 7)
		town.happens("1", "shop", "start", "")
		town.ends("1", "shop", 7)
		town.has(`1 shop,"State":"restarting"`)
		town.answers["/containers/1/json"] = fmt.Sprintf(loops, 2*n+2)
		town.polls("in a crash loop", fmt.Sprintf("shop.failed_exits %d", 2*n+3), "shop.oom_kills 0",
			fmt.Sprintf("shop.restarts %d", 2*n+2), "!shop.uptime", "!shop.memory", "h.metrics.failed 0",
			"h.metrics.sampled 1")
	}
	town.past.refused = true
	town.polls("without events", "shop.restarts 6", "!shop.failed_exits", "!shop.uptime")
}
