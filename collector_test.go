package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// collecting returns a collector of an engine whose calls may take as long as timeout, and its log.
func collecting(t testing.TB, address string, timeout time.Duration) (*collector, *harness.Log) {
	t.Helper()
	e, err := newEngine(address, timeout)
	harness.Must(t, err)
	log := &harness.Log{}
	return newCollector(e, nil, log.Logger()), log
}

// censusOf takes over a list of containers whose images are known.
func censusOf(cs *containers, list []listed, host string) *census {
	cs.remember(list)
	cs.apply(host)
	return cs.share()
}

func TestSweep(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	c, log := collecting(t, r.URL, 10*time.Second)
	c.containers.rules, c.per = renaming(regexp.MustCompile(`^fx-`), "shop."), details{true, true, true}
	before := time.Now().Unix()
	result := c.sweep(t.Context())
	after := time.Now().Unix()
	if result.err != nil || result.running != 6 || result.failed != 0 {
		t.Errorf("%d running, %d failed, %v", result.running, result.failed, result.err)
	}

	lines := asLines(result.metrics)
	golden := r.Read("stats-one-shot-busy.golden")
	if want := strings.ReplaceAll(string(golden), "c.", "shop.busy."); !strings.Contains(lines, want) {
		t.Errorf("got\n%swhich lacks\n%s", lines, want)
	}
	for _, want := range []string{
		`(?m)^shop\.two\.uptime \d+ (\d+)$`,
		`(?m)^vmtest\.containers\.total 6 (\d+)$`,
		`(?m)^vmtest\.metrics\.duration [1-9]\d{5,9} (\d+)$`, // 0.1 ms to 10 s
	} {
		found := regexp.MustCompile(want).FindStringSubmatch(lines)
		if found == nil {
			t.Errorf("got\n%swhich lacks %s", lines, want)
			continue
		}
		if at := found[1]; at < fmt.Sprint(before) || at > fmt.Sprint(after) {
			t.Errorf("%s is not the time of a sweep from %d to %d", found[0], before, after)
		}
	}

	// fx-web, which is in the list, was removed meanwhile: that is no trouble.
	want := `level=INFO msg="Docker engine answers" engine="Docker/20.10.24 (linux)" ` +
		`api=1.41 one_shot=true host=vmtest running=6
`
	if got := log.Take(); got != want {
		t.Errorf("logged\n%swant\n%s", got, want)
	}
	c.sweep(t.Context())
	if got := log.Take(); got != "" {
		t.Errorf("a second time, it logged\n%s", got)
	}
}

func TestHostName(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, 10*time.Second)
	c.host = "web1.example.com"
	lines := asLines(c.sweep(t.Context()).metrics)
	if !strings.Contains(lines, "\nweb1_example_com.containers.total 6 ") {
		t.Errorf("--host made\n%s", lines)
	}
}

// A proxy before the engine that forbids /info costs the host's figures and one warning, no more.
func TestEngineThatDoesNotTellAboutItself(t *testing.T) {
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	r := harness.NewReplay(t, "cgroup2")
	r.On("/info", harness.AnswerWith(http.StatusForbidden, "no"))
	c, log := collecting(t, r.URL, 10*time.Second)
	for range 2 {
		result := c.sweep(t.Context())
		lines := asLines(result.metrics)
		if result.err != nil || !strings.Contains(lines, "\n"+graphiteNode(own)+".containers.total 6 ") ||
			!strings.Contains(lines, "\nfx-two.uptime ") {
			t.Errorf("without /info it is %v\n%s", result.err, lines)
		}
	}
	if got := log.Take(); strings.Count(got, "level=WARN") != 1 ||
		!strings.Contains(got, `set it with --host" host=`+graphiteNode(own)+
			` error="API error (403): no; the engine, or a proxy before it, forbids GET /info"`) {
		t.Errorf("logged %s", got)
	}
	r.On("/info", nil)
	lines := asLines(c.sweep(t.Context()).metrics)
	if !strings.Contains(lines, "\nvmtest.containers.paused 1 ") {
		t.Errorf("with /info again it is\n%s", lines)
	}
}

// The engine's and the sweep's own figures.
func TestHostFigures(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	r.On("/containers/fx-two/stats", harness.AnswerWith(500, "{}"))
	c, _ := collecting(t, r.URL, 10*time.Second)
	c.containers.rules = renaming(regexp.MustCompile(`^fx-(paused|host)$`), "same")
	result := c.sweep(t.Context())
	if result.running != 6 {
		t.Errorf("%d are running", result.running)
	}
	lines := asLines(result.metrics)
	for _, want := range []string{
		// From the recorded list of all
		"containers.running 5", "containers.paused 1", "containers.stopped 1",
		// fx-web is gone, fx-two fails, one of two is left out, three are left.
		"containers.total 6", "metrics.sampled 3", "metrics.failed 1", "metrics.collisions 1",
	} {
		if !strings.Contains(lines, "\nvmtest."+want+" ") {
			t.Errorf("want vmtest.%s, got\n%s", want, lines)
		}
	}
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
		{"until it goes", []listed{entry("web-1", 10)}, "web-1", 0, ""},
	} {
		now := censusOf(c, test.list, "h")
		asked, collisions := now.asked, now.collisions
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
	if now, err := c.survey(t.Context()); err != nil || len(now.unnamed) != 0 ||
		len(inspected()) != 0 {
		t.Errorf("%v, %v", now.unnamed, err)
	}
}

// A host that comes to be known by another name is so in ${host}.
func TestHostInPaths(t *testing.T) {
	c := newCollector(nil, mustRules(t, `{"regexp":"(.*)","into":"${host}.$1"}`),
		(&harness.Log{}).Logger())
	list := []listed{{ID: "1", Names: []string{"/web"}}}
	for _, host := range []string{"one", "two.example"} {
		c.about.Name = host
		if now := censusOf(&c.containers, list, c.hostName()); len(now.asked) != 1 ||
			now.asked[0].path != graphiteNode(host)+".web" {
			t.Errorf("on %s: %+v", host, now.asked[0])
		}
	}
}

// One bad container costs the others nothing, and one line.
func TestOneBadContainerIsOnItsOwn(t *testing.T) {
	const (
		failed = `level=ERROR msg="container cannot be read" container=fx-two error=`
		read   = `"read":"2026-11-23T04:54:40Z",`
	)
	ok := func(body string) http.HandlerFunc { return harness.AnswerWith(200, body) }
	for why, test := range map[string]struct {
		answer http.HandlerFunc
		log    string
	}{
		"hangs": {harness.Hang, failed + `"no answer within 2s"`},
		"is not JSON": {ok(`<html>`), failed + `"its stats answer is not JSON: ` +
			`invalid character '<' looking for beginning of value"`},
		"is cut": {ok(`{"read":"2026-11-23T`), failed + `"its stats answer is not JSON: ` +
			`unexpected end of JSON input"`},
		"is huge": {ok(strings.Repeat(" ", 50<<20)), failed + `"the answer has over 33554432 bytes"`},
		"is deep": {ok(`{"read":` + strings.Repeat("[", 20_000)),
			failed + `"its stats answer is not JSON: invalid character '[' exceeded max depth"`},
		"has no time": {ok(`{"message":"oops"}`), failed + `"its stats answer has no time of reading"`},
		"is an array": {ok(`[]`), failed + `"its stats answer is not JSON: json: cannot unmarshal ` +
			`array into Go value of type main.stats"`},
		"hangs up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			failed + `EOF`},
		"fails": {harness.AnswerWith(500, `{"message":"device or resource busy"}`),
			failed + `"API error (500): device or resource busy"`},
		"has time 0": {ok(`{"read":"1970-01-01T00:00:00Z","memory_stats":{"usage":1}}`),
			failed + `"its stats answer is of 1970-01-01 00:00:00 +0000 UTC"`},
		"says nothing": {ok(`{"read":"0001-01-01T00:00:00Z","memory_stats":{"usage":1}}`),
			failed + `"its stats answer is empty"`},
		"says nothing, Podman": {ok(``), failed + `"its stats answer is empty"`},
		"is in conflict": {harness.AnswerWith(409, `{"message":"busy"}`),
			failed + `"API error (409): busy"`},
		"is not found, but runs": {harness.AnswerWith(404, `no page`),
			failed + `"API error (404): no page"`},
		"was removed": {harness.AnswerWith(404, `{}`), ""},
	} {
		t.Run(why, func(t *testing.T) {
			t.Parallel()
			wantFailed := strings.Count(test.log, failed)
			r := harness.NewReplay(t, "cgroup2")
			r.On("/containers/fx-web/stats", r.Serve("stats-one-shot-idle.json"))
			r.On("/containers/fx-web/json", r.Serve("inspect-idle.json"))
			c, log := collecting(t, r.URL, 2*time.Second)
			well := c.sweep(t.Context())
			log.Take()

			r.On("/containers/fx-two/stats", test.answer)
			if why == "was removed" {
				r.On("/containers/fx-two/json", test.answer)
			}
			for range 2 {
				result := c.sweep(t.Context())
				if result.err != nil || result.failed != wantFailed || result.running != 6 {
					t.Errorf("%d of %d failed, %v", result.failed, result.running, result.err)
				}
				lines := asLines(result.metrics)
				for _, name := range []string{"idle", "busy", "host", "paused", "web"} {
					got := strings.Count(lines, "fx-"+name+".")
					want := strings.Count(asLines(well.metrics), "fx-"+name+".")
					if got < want {
						t.Errorf("it cost fx-%s %d of its %d metrics", name, want-got, want)
					}
				}
				if strings.Contains(lines, "fx-two") {
					t.Errorf("it still has metrics:\n%s", lines)
				}
			}
			if got := strings.TrimSpace(log.Take()); got != test.log {
				t.Errorf("two bad sweeps logged\n%s\nwant\n%s", got, test.log)
			}

			r.On("/containers/fx-two/stats", nil)
			r.On("/containers/fx-two/json", nil)
			lines, want := asLines(c.sweep(t.Context()).metrics), asLines(well.metrics)
			if strings.Count(lines, "fx-two.") < strings.Count(want, "fx-two.") {
				t.Errorf("well again, there is\n%s", lines)
			}
			got := log.Take()
			isBack := got == "level=INFO msg=\"container can be read again\" container=fx-two\n"
			if wantFailed > 0 && !isBack ||
				wantFailed == 0 && got != "" {
				t.Errorf("well again, it logged %s", got)
			}
		})
	}
}

// What engines answer for a container that has just stopped, they also answer for some that run:
// only inspect tells.
func TestStoppedIsNotAFailure(t *testing.T) {
	for why, answer := range map[string]http.HandlerFunc{
		"one-shot":        harness.AnswerWith(500, `{"message":"cgroups: cgroup deleted"}`),
		"collector":       harness.AnswerWith(200, `{"read":"0001-01-01T00:00:00Z"}`),
		"Podman 2 and 3":  harness.AnswerWith(409, `{"message":"container is not running"}`),
		"Podman 4":        harness.AnswerWith(200, ``),
		"removed as well": harness.AnswerWith(404, `{}`),
	} {
		r := harness.NewReplay(t, "cgroup2")
		r.On("/containers/fx-two/stats", answer)
		r.On("/containers/fx-two/json", r.Serve("inspect-exited.json"))
		c, log := collecting(t, r.URL, 10*time.Second)
		if result := c.sweep(t.Context()); result.failed != 0 {
			t.Errorf("%s: %d failed", why, result.failed)
		}
		if got := log.Take(); strings.Contains(got, "fx-two") {
			t.Errorf("%s: logged %s", why, got)
		}
	}
}

func TestEngineThatComesAndGoes(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	c, log := collecting(t, r.URL, 10*time.Second)
	hangUp := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	down := func() {
		for _, path := range []string{"/_ping", "/info", "/containers/json", "/containers/fx-two/stats",
			"/containers/fx-idle/stats"} {
			r.On(path, hangUp)
		}
	}
	up := r.Well
	expect := func(when string, ok bool, lines ...string) {
		t.Helper()
		if result := c.sweep(t.Context()); (result.err == nil) != ok {
			t.Errorf("%s: error %v", when, result.err)
		}
		got := log.Take()
		if strings.Count(got, "\n") != len(lines) {
			t.Errorf("%s: logged\n%s", when, got)
		}
		for _, line := range lines {
			if !strings.Contains(got, line) {
				t.Errorf("%s: logged\n%swant %s", when, got, line)
			}
		}
	}
	const fails, answers = `level=ERROR msg="Docker engine does not answer" error=EOF`,
		`level=INFO msg="Docker engine answers"`
	down()
	expect("down at the start", false, fails)
	expect("still down", false)
	up()
	r.Is("1.40")
	expect("up", true, answers+` engine="Docker/20.10.24 (linux)" api=1.40 one_shot=false`)
	expect("still up", true)
	r.Is("1.43") // upgraded between two polls
	expect("upgraded, not yet noticed", true)
	expect("upgraded", true, answers+` engine="Docker/20.10.24 (linux)" api=1.43 one_shot=true`)
	down()
	expect("down again", false, fails)
	up()
	r.Is("1.41") // it was upgraded
	expect("up again", true, answers+` engine="Docker/20.10.24 (linux)" api=1.41 one_shot=true`)

	// Down in the middle of a sweep: that is the engine's trouble, no container's. What was read
	// counts.
	down()
	r.On("/containers/json", nil)
	if result := c.sweep(t.Context()); result.err == nil || !strings.Contains(asLines(result.metrics),
		"fx-busy.cpu.total") {
		t.Errorf("down in the middle: %v", result.err)
	}
	if got := log.Take(); got != fails+"\n" {
		t.Errorf("down in the middle: logged\n%s", got)
	}
	up()
	expect("up once more", true, answers)
}

func TestEndingIsNobodysFault(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	c, log := collecting(t, r.URL, 10*time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	r.On("/containers/fx-two/stats", func(_ http.ResponseWriter, req *http.Request) {
		cancel()
		<-req.Context().Done()
	})
	result := c.sweep(ctx)
	if result.failed != 0 || result.err != context.Canceled {
		t.Errorf("%d failed, %v", result.failed, result.err)
	}
	if lines := asLines(result.metrics); strings.Contains(lines, "vmtest.") {
		t.Errorf("half a sweep says of the host\n%s", lines)
	}
	if got := log.Take(); strings.Contains(got, "ERROR") {
		t.Errorf("logged\n%s", got)
	}
}

// All are asked at once: engines that answer at their next tick would take a tick for each
// group that is asked together.
func TestAllAreAskedSideBySide(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	const containers = 300
	var list []string
	var together sync.WaitGroup
	together.Add(containers)
	serve := r.Serve("stats-one-shot-idle.json")
	for i := range containers {
		id, name := fmt.Sprintf("%064x", i), fmt.Sprintf("web%d", i)
		r.Add(id, name)
		list = append(list, fmt.Sprintf(`{"Id":%q,"Names":["/%s"]}`, id, name))
		r.On("/containers/"+name+"/stats", func(w http.ResponseWriter, req *http.Request) {
			together.Done()
			together.Wait() // none is answered before all have been asked
			serve(w, req)
		})
		r.On("/containers/"+name+"/json", r.Serve("inspect-idle.json"))
	}
	r.On("/containers/json", harness.AnswerWith(200, "["+strings.Join(list, ",")+"]"))
	c, log := collecting(t, r.URL, time.Minute)
	if result := c.sweep(t.Context()); result.failed != 0 || result.running != containers {
		t.Errorf("%d of %d failed: %s", result.failed, result.running, log.Take())
	}
}

// An engine's clock can be ahead of ours.
func TestUptimeIsNeverNegative(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	r.On("/containers/fx-two/json",
		harness.AnswerWith(200, `{"State":{"Running":true,"StartedAt":"2300-01-01T00:00:00Z"}}`))
	c, _ := collecting(t, r.URL, 10*time.Second)
	if lines := asLines(c.sweep(t.Context()).metrics); !strings.Contains(lines, "\nfx-two.uptime 0 ") {
		t.Errorf("got\n%s", lines)
	}
}

func TestAnswersTellWhoseTheyAre(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	answer, err := os.ReadFile("testdata/engine/windows/stats-web.json")
	if err != nil {
		t.Fatal(err)
	}
	for header, want := range map[string]string{
		"windows": "fx-two.cpu.total 1421875000 ", // of ticks of 100 ns
		"linux":   "fx-two.cpu.total 14218750 ",
	} {
		r.On("/containers/fx-two/stats", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Ostype", header)
			w.Write(answer)
		})
		c, _ := collecting(t, r.URL, 10*time.Second)
		if lines := asLines(c.sweep(t.Context()).metrics); !strings.Contains("\n"+lines, "\n"+want) {
			t.Errorf("with Ostype %s:\n%s", header, lines)
		}
	}
}

// Inspect is asked of containers that may have been started since the last time, and only of
// those; the uptime is right all the same.
func TestInspectOnlyAfterAStart(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, 10*time.Second)
	known, now := new(container), new(inspected)
	now.State.Running = true
	asks := func(cpu uint64) bool {
		stale := known.isStale(counted(cpu))
		if stale {
			known.learn(now)
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
	if known.last = nil; known.isStale(count{}) {
		t.Error("it is asked because nothing is known of its CPU time")
	}

	// And in a whole sweep: the recorded containers are up for 40 s.
	r.Questions()
	c.sweep(t.Context())
	if asked := strings.Join(r.Questions(), " "); strings.Count(asked, "/json ") != 6 {
		t.Errorf("the first sweep asked %s", asked) // an inspect each
	}
	lines := asLines(c.sweep(t.Context()).metrics)
	want := "/containers/fx-busy/stats /containers/fx-host/stats /containers/fx-idle/stats " +
		"/containers/fx-paused/stats /containers/fx-two/stats /containers/fx-web/json " + // is gone
		"/containers/fx-web/stats /containers/json?all=1 /events"
	if asked := regexp.MustCompile(`\?(stream|filters)\S*`).ReplaceAllString(
		strings.Join(r.Questions(), " "), ""); asked != want {
		t.Errorf("the second sweep asked %s, want %s", asked, want)
	}
	if strings.Count(lines, ".uptime ") != 5 {
		t.Errorf("the second sweep made\n%s", lines)
	}
	if len(c.containers.byID) != 6 {
		t.Errorf("%d containers are remembered", len(c.containers.byID))
	}
}

// BenchmarkSweep is a whole sweep, from the list to the accepted POST, of an engine that answers at
// once. The engine and the stand-in are in the same process: see BenchmarkAgainstTheFloor for what
// is ours. Its use is the profile.
func BenchmarkSweep(b *testing.B) {
	const n = 1000
	e, err := newEngine(harness.Crowd(b, n, 0), 10*time.Second)
	if err != nil {
		b.Fatal(err)
	}
	s := harness.NewStandIn(b)
	s.Set("", harness.AnswerWith(http.StatusOK, "ok"))
	target := mustBackstop(b, s.URL+"/publish/docker")
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	c := newCollector(e, nil, log)
	q, _ := newRig(b, destination{name: "Backstop", post: target.post}, 256<<20, "")
	c.sweep(b.Context()) // which asks for more
	b.ReportAllocs()
	for b.Loop() {
		result := c.sweep(b.Context())
		q.put(append(result.metrics, q.own("h", time.Now())...))
		for q.waiting() > 0 {
			if err := q.try(b); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// calls is an engine as flow sees it.
type calls struct {
	takes func(i int) time.Duration

	mu             sync.Mutex
	inFlight, most int
	done           map[int]int // how often each was called
}

func (c *calls) do(i int) {
	c.mu.Lock()
	c.inFlight++
	c.most = max(c.most, c.inFlight)
	c.mu.Unlock()
	time.Sleep(c.takes(i))
	c.mu.Lock()
	c.inFlight--
	c.done[i]++
	c.mu.Unlock()
}

func TestFlow(t *testing.T) {
	atOnce := func(int) time.Duration { return 3 * time.Millisecond }
	// As an engine with a collector that runs every second; a sweep begins at some time between two of
	// its ticks.
	atTick := func(int) time.Duration {
		return time.Until(time.Now().Truncate(time.Second).Add(time.Second))
	}
	// As an engine on a host with other work, which may hold it up for longer.
	busy := func(i int) time.Duration {
		if i%50 == 40 {
			return 120 * time.Millisecond
		}
		return time.Duration(10+i%40) * time.Millisecond
	}
	stops := func(int) time.Duration { // all of them at the same time
		into := time.Duration(time.Now().UnixNano()) % (400 * time.Millisecond)
		return 5*time.Millisecond + max(0, 110*time.Millisecond-into)
	}
	oneHangs := func(i int) time.Duration {
		if i == 3 {
			return 10 * time.Second
		}
		return 3 * time.Millisecond
	}
	for _, test := range []struct {
		why        string
		takes      func(int) time.Duration
		limit, n   int
		begin      time.Duration // after a tick
		most       int           // in flight, in the second sweep
		wall       time.Duration // of the second sweep, at most
		firstSweep time.Duration // at most
	}{
		{"at once", atOnce, 0, 1000, 0, fewInFlight, 200 * time.Millisecond, 200 * time.Millisecond},
		{"busy", busy, 0, 100, 0, fewInFlight, time.Second, time.Second},
		{"stops now and then", stops, 0, 1000, 0, 2 * fewInFlight, time.Second, time.Second},
		{"at its tick", atTick, 0, 300, 300 * time.Millisecond, 300, time.Second, time.Second},
		{"at its tick, many", atTick, 0, 1000, 300 * time.Millisecond, maxInFlight, 2 * time.Second,
			2 * time.Second},
		{"one hangs", oneHangs, 0, 1000, 0, fewInFlight, 10 * time.Second, 10 * time.Second},
		{"as it is told", atTick, 50, 100, 300 * time.Millisecond, 50, 2 * time.Second, 2 * time.Second},
		{"one at a time", atOnce, 1, 10, 0, 1, 30 * time.Millisecond, 30 * time.Millisecond},
		{"none", atOnce, 0, 0, 0, 0, 0, 0},
		{"a few", atTick, 0, 3, 300 * time.Millisecond, 3, time.Second, time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := flow{limit: test.limit}
			for sweep, wall := range []time.Duration{test.firstSweep, test.wall} {
				time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second + test.begin)))
				c := &calls{takes: test.takes, done: map[int]int{}}
				start := time.Now()
				f.run(test.n, c.do)
				if took := time.Since(start); took > wall {
					t.Errorf("%s: sweep %d took %s", test.why, sweep+1, took)
				}
				if len(c.done) != test.n || c.inFlight != 0 {
					t.Errorf("%s: %d of %d done, %d in flight", test.why, len(c.done), test.n, c.inFlight)
				}
				for i, n := range c.done {
					if n != 1 {
						t.Errorf("%s: %d was called %d times", test.why, i, n)
					}
				}
				if sweep == 1 && c.most != test.most {
					t.Errorf("%s: %d in flight", test.why, c.most)
				}
			}
		})
	}
}

// What real engines answer that others do not: see the reports named in the tests.

// small is an engine of a few answers. A path that has none gets 404.
type small struct {
	*harness.Replay
	answers map[string]string // to a path, without its query
}

// newSmall starts an engine whose list is that text, and returns a collector of it as well.
func newSmall(t *testing.T, list string) (*small, *collector, *harness.Log) {
	t.Helper()
	s := &small{harness.NewReplay(t, "cgroup2"), map[string]string{
		"/_ping": "OK", "/events": "", "/info": `{"Name":"h"}`, "/containers/json": list,
	}}
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, known := s.answers[r.URL.Path]
		if !known {
			w.WriteHeader(http.StatusNotFound)
		}
		io.WriteString(w, answer)
	})
	c, log := collecting(t, s.URL, 10*time.Second)
	return s, c, log
}

// container makes a container known by its id.
func (s *small) container(id, inspect, stats string) {
	s.answers["/containers/"+id+"/json"] = inspect
	s.answers["/containers/"+id+"/stats"] = stats
}

const (
	smallStats   = `{"read":"2026-01-01T00:01:00Z","memory_stats":{"usage":1}}`
	smallInspect = `{"State":{"Running":true,"StartedAt":"2026-01-01T00:00:00Z"},"RestartCount":3}`
)

func caseOf(t *testing.T, file string) string {
	t.Helper()
	return harness.ReadFile(t, "testdata/engine/cases/"+file)
}

// wants holds the metrics of a sweep to lines of "name value" or, behind "!", starts of names.
func wants(t *testing.T, why string, result sweepResult, lines ...string) {
	t.Helper()
	got := "\n" + asLines(result.metrics)
	for _, line := range lines {
		name, without := strings.CutPrefix(line, "!")
		if without == strings.Contains(got, "\n"+strings.TrimSpace(name)+" ") &&
			(!without || strings.Contains(got, "\n"+name)) {
			t.Errorf("%s: want %q, got%s", why, line, got)
		}
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

// Where the list has no name that is the container's own, the end of another one is taken, or the
// start of the id.
func TestNamesThatAreNone(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for names, want := range map[string]string{
		`["/web"]`:                 "web",
		`["web"]`:                  "web", // Podman's stats have them so
		`["/shop/db","/postgres"]`: "postgres",
		`null`:                     id[:12], `[]`: id[:12], `[""]`: id[:12], `["/"]`: id[:12], `["/node-1/"]`: id[:12],
		`["/node-1/web"]`: "web",
	} {
		s, c, _ := newSmall(t, `[{"Id":"`+id+`","Names":`+names+`}]`)
		s.container(id, smallInspect, smallStats)
		wants(t, names, c.sweep(t.Context()), want+".uptime 60", "h.metrics.sampled 1",
			"h.metrics.failed 0")
		table, ok, err := check(t.Context(), c)
		if !ok || err != nil || !strings.Contains(table, "\n"+want+" ") {
			t.Errorf("%s: %t, %v\n%s", names, ok, err, table)
		}
	}
}

// Nothing is sent under the name of a host that is not known yet.
func TestHostThatIsNotKnownYet(t *testing.T) {
	t.Parallel()
	own, _ := os.Hostname()
	rule := `{"regexp":"^(.*)$","from":"label:x","into":"${host}.$1"}`
	for _, test := range []struct {
		why    string
		answer http.HandlerFunc
		host   string // "" for none
	}{
		{"hangs", harness.Hang, ""},
		{"fails", harness.AnswerWith(500, "{}"), ""},
		{"is no JSON", harness.AnswerWith(200, "<html>"), ""},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ""},
		{"is refused", harness.AnswerWith(403, "no"), own},
		{"is not there", harness.AnswerWith(404, "no"), own},
		{"has no name", harness.AnswerWith(200, "{}"), own},
	} {
		t.Run(test.why, func(t *testing.T) {
			r := harness.NewReplay(t, "cgroup2")
			var list []map[string]any
			harness.Must(t, json.Unmarshal(r.Read("containers.json"), &list))
			list = list[:2] // fx-paused, fx-two
			list[0]["Labels"] = map[string]string{"x": "labelled"}
			body, _ := json.Marshal(list)
			r.On("/containers/json", harness.AnswerWith(200, string(body)))
			r.On("/info", test.answer)
			c, log := collecting(t, r.URL, time.Second)
			c.containers.rules = mustRules(t, rule)
			for range 2 {
				lines := asLines(c.sweep(t.Context()).metrics)
				hosts := regexp.MustCompile(`(?m)^(.*)\.containers\.total `).FindStringSubmatch(lines)
				if test.host == "" && (hosts != nil || strings.Contains(lines, "labelled.")) ||
					test.host != "" && (hosts == nil || hosts[1] != graphiteNode(test.host) ||
						!strings.Contains(lines, graphiteNode(test.host)+".labelled.uptime ")) ||
					!strings.Contains(lines, "fx-two.uptime ") {
					t.Errorf("there is\n%s", lines)
				}
			}
			if got := log.Take(); strings.Count(got, "level=WARN") > 1 {
				t.Errorf("logged %s", got)
			}
			r.On("/info", nil)
			c.about.askedAt = time.Time{}
			c.sweep(t.Context())
			if lines := asLines(c.sweep(t.Context()).metrics); !strings.Contains(lines,
				"\nvmtest.containers.total 2 ") || !strings.Contains(lines, "vmtest.labelled.uptime ") {
				t.Errorf("well again, there is\n%s", lines)
			}
		})
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

func TestCPULimit(t *testing.T) {
	for _, test := range []struct{ host, want string }{
		{`{}`, ""},
		{`{"NanoCpus":0,"CpuQuota":0,"CpuPeriod":0,"CpusetCpus":""}`, ""},
		{`{"NanoCpus":1500000000}`, "1.5"},
		{`{"CpuQuota":20000,"CpuPeriod":10000}`, "2"},
		{`{"CpuQuota":20000}`, "0.2"},
		{`{"CpusetCpus":"0-2,7"}`, "4"},
		{`{"CpusetCpus":"0","NanoCpus":2000000000}`, "1"},
		{`{"CpusetCpus":"0-","NanoCpus":2000000000}`, "2"},
		{`{"CpusetCpus":"3-1"}`, ""},
	} {
		var now inspected
		err := decodeLoosely([]byte(`{"HostConfig":`+test.host+`}`), &now)
		harness.Must(t, err)
		got := ""
		if limit := now.cpuLimit(); limit > 0 {
			v, _ := decimal(limit)
			got = string(v.append(nil))
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.host, got, test.want)
		}
	}
}

// Uptime goes by the engine's clock, and one warning says how far that is off.
func TestEngineWithAnotherClock(t *testing.T) {
	for _, ahead := range []time.Duration{0, 20 * time.Second, 2 * time.Hour, -3 * time.Hour} {
		s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 1 minute"}]`)
		handler := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			now := time.Now().Add(ahead)
			w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
			s.answers["/info"] = `{"Name":"h","SystemTime":"` + now.Format(time.RFC3339Nano) + `"}`
			s.container("1", `{"State":{"Running":true,"StartedAt":"`+
				now.Add(-time.Minute).Format(time.RFC3339Nano)+`"}}`,
				`{"read":"`+now.Format(time.RFC3339Nano)+`"}`)
			if r.URL.Path == "/events" {
				until := r.URL.Query().Get("until")
				if until > unixNano(now) || until < unixNano(now.Add(-time.Second)) {
					t.Errorf("events are asked up to %s, it is %s", until, unixNano(now))
				}
			}
			handler.ServeHTTP(w, r)
		})
		for range 2 {
			lines := asLines(c.sweep(t.Context()).metrics)
			if !regexp.MustCompile(`(?m)^web\.uptime (59|60) `).MatchString(lines) {
				t.Errorf("ahead by %s\n%s", ahead, lines)
			}
		}
		got := log.Take()
		if want := ahead.Abs() > maxSkew; (strings.Count(got, "level=WARN") == 1) != want ||
			want && !strings.Contains(got, "ahead="+ahead.String()) {
			t.Errorf("ahead by %s, it logged %s", ahead, got)
		}
	}
}

// pastEvents is an engine's memory of events.
type pastEvents struct {
	all     []string // JSON
	asked   int
	refused bool
}

// add remembers an event.
func (p *pastEvents) add(id, action, attributes string, at time.Time) {
	p.all = append(p.all, fmt.Sprintf(`{"status":%q,"id":%q,"Type":"container","Action":%q,`+
		`"Actor":{"ID":%q,"Attributes":{%s}},"time":%d,"timeNano":%d}`,
		action, id, action, id, attributes, at.Unix(), at.UnixNano()))
	p.all = p.all[max(0, len(p.all)-256):]
}

func (p *pastEvents) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.asked++
	if p.refused {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	for _, text := range p.all {
		var one event
		json.Unmarshal([]byte(text), &one)
		at := unixNano(time.Unix(0, one.TimeNano))
		if q := r.URL.Query(); at >= q.Get("since") && at <= q.Get("until") {
			fmt.Fprintln(w, text)
		}
	}
}

// Each event is counted once, also at the border of two polls, over a new start of the engine, and
// after a clock was set back.
func TestEventsAreCountedOnce(t *testing.T) {
	r := harness.NewReplay(t, "cgroup2")
	r.On("/info", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"Name":"vmtest","SystemTime":%q}`, time.Now().Format(time.RFC3339Nano))
	})
	// Longer ago than a call takes, and within what is asked for again
	lately := func() time.Time { return time.Now().Add(-time.Second) }
	past := &pastEvents{}
	r.On("/events", past.ServeHTTP)
	c, log := collecting(t, r.URL, 10*time.Second)
	past.add("old", "die", `"exitCode":"1"`, lately())
	expect := func(why string, start, die, failed, oom, unhealthy int) {
		t.Helper()
		wants(t, why, c.sweep(t.Context()), fmt.Sprintf("vmtest.events.start %d", start),
			fmt.Sprintf("vmtest.events.die %d", die), fmt.Sprintf("vmtest.events.die_nonzero %d", failed),
			fmt.Sprintf("vmtest.events.oom %d", oom), fmt.Sprintf("vmtest.events.unhealthy %d", unhealthy))
	}
	expect("at first", 0, 0, 0, 0, 0)
	border := c.events.until
	past.add("a", "start", ``, border.Add(-time.Nanosecond)) // told late
	past.add("a", "oom", ``, border)
	past.add("a", "die", `"exitCode":"137"`, border.Add(1))
	past.add("b", "health_status: unhealthy", ``, border.Add(2))
	past.add("b", "die", `"exitCode":"0"`, border.Add(3))
	past.add("b", "die", ``, border.Add(3))         // twice the same
	time.Sleep(time.Until(border.Add(time.Second))) // the engine's time is asked for in whole seconds
	for range 3 {
		expect("then", 1, 2, 1, 1, 1)
	}
	c.events.until = c.events.until.Add(time.Hour) // the engine's clock was an hour ahead
	past.add("c", "die", `"exitCode":"2"`, lately())
	expect("set back", 1, 3, 2, 1, 1)
	past.all = nil
	expect("a new engine", 1, 3, 2, 1, 1)
	past.add("a", "start", ``, lately())
	expect("and its first event", 2, 3, 2, 1, 1)

	r.On("/events", harness.AnswerWith(500, "{}"))
	past.add("a", "die", `"exitCode":"0","exitcode":"1"`, lately()) // the other is a label
	expect("while it fails", 2, 3, 2, 1, 1)
	r.On("/events", past.ServeHTTP)
	expect("and what was meanwhile", 2, 4, 2, 1, 1)
	past.all = append(past.all, `{"Type":"container","Action":7,"timeNano":"x"}`)
	expect("with one that is broken", 2, 4, 2, 1, 1)
	log.Take()

	past.refused = true
	for range 2 {
		result := c.sweep(t.Context())
		wants(t, "refused", result, "!vmtest.events.", "vmtest.containers.total 6")
	}
	if got := log.Take(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, "/events") {
		t.Errorf("refused, it logged %s", got)
	}
}

// A steady poll is one list, one stats call for each container, and one question for events. An
// update makes one inspect more.
func TestSteadyPoll(t *testing.T) {
	s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
	past := &pastEvents{}
	var mu sync.Mutex
	asked := map[string]int{}
	handler := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked[r.URL.Path]++
		mu.Unlock()
		if r.URL.Path == "/events" {
			past.ServeHTTP(w, r)
			return
		}
		handler.ServeHTTP(w, r)
	})
	s.container("1", smallInspect, smallStats)
	expect := func(why string, want map[string]int) {
		t.Helper()
		clear(asked)
		c.sweep(t.Context())
		if fmt.Sprint(asked) != fmt.Sprint(want) {
			t.Errorf("%s: asked %v, want %v", why, asked, want)
		}
	}
	steady := map[string]int{"/containers/json": 1, "/containers/1/stats": 1, "/events": 1}
	expect("first", map[string]int{"/_ping": 1, "/info": 1, "/containers/json": 1,
		"/containers/1/stats": 1, "/containers/1/json": 1, "/events": 1})
	expect("steady", steady)
	past.add("1", "update", ``, time.Now().Add(-time.Second))
	s.container("1", `{"State":{"Running":true},"HostConfig":{"NanoCpus":250000000}}`, smallStats)
	updated := maps.Clone(steady)
	updated["/containers/1/json"] = 1
	expect("updated", updated)
	wants(t, "updated", c.sweep(t.Context()), "web.cpu.limit 0.25")
	expect("steady again", steady)
	c.about.askedAt = time.Now().Add(-refresh - time.Second)
	later := maps.Clone(steady)
	later["/info"] = 1
	expect("after ten minutes", later)
}

// Docker 26 says of a container whose process has just ended that it runs, for up to a second.
func TestAContainerThatEndsIsNotAFailure(t *testing.T) {
	s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
	s.container("1", smallInspect, smallStats)
	c.sweep(t.Context())
	log.Take()
	s.container("1", "", `{"message":"no metrics received"}`)
	asked := 0
	handler := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/containers/1/json" {
			handler.ServeHTTP(w, r)
			return
		}
		if asked++; asked < 2 {
			io.WriteString(w, smallInspect)
		} else {
			io.WriteString(w, `{"State":{"Running":false}}`)
		}
	})
	if result := c.sweep(t.Context()); result.failed != 0 || asked != 2 {
		t.Errorf("%d failed, inspect was asked %d times", result.failed, asked)
	}
	if got := log.Take(); got != "" {
		t.Errorf("it logged %s", got)
	}
}

// inBubble is an engine without a network, for tests with a clock of their own.
type inBubble http.HandlerFunc

func (answer inBubble) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	answer(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

// One that hangs, or 230, hold up neither the calls for the others nor the end of the sweep.
func TestWhatHangsCostsTheOthersNothing(t *testing.T) {
	const (
		sick, well = 230, 20
		limit      = 10 * time.Second
		growth     = 4 * silence // from 16 calls at the same time to 256
		plain      = `{"regexp":"x","into":"y"}`
	)
	isOf := func(end string) func(path string, i int) time.Duration {
		return func(path string, i int) time.Duration {
			if i >= 0 && i < sick && strings.HasSuffix(path, end) {
				return time.Hour
			}
			return 0
		}
	}
	isPath := func(path string) func(string, int) time.Duration {
		return func(asked string, _ int) time.Duration {
			if asked == path {
				return time.Hour
			}
			return 0
		}
	}
	for _, test := range []struct {
		why     string
		rule    string
		takes   func(path string, i int) time.Duration // of container i, -1 for none
		sampled int
		first   time.Duration // until the last of the others was asked, in the first sweep
		later   time.Duration // and in the second one
		ends    time.Duration // of both, at most
	}{
		{"inspects, for the image", `{"from":"image","regexp":"^x","into":"y"}`, isOf("/json"),
			well, limit / 4, limit / 4, limit},
		{"inspects, for the uptime", plain, isOf("/json"),
			well, growth, 0, limit},
		{"stats", plain, isOf("/stats"), well, growth, 0, limit},
		{"an inspect after slow stats", plain,
			func(path string, i int) time.Duration {
				return map[string]time.Duration{"/containers/0/stats": limit * 9 / 10,
					"/containers/0/json": time.Hour}[path]
			}, sick + well - 1, 0, 0, limit},
		{"/info", plain, isPath("/info"), sick + well, limit / 2, 0, limit},
		{"/info, and the host is needed", `{"regexp":"x","into":"${host}"}`, isPath("/info"),
			sick + well, limit / 2, limit / 2, limit},
		{"/events", plain, isPath("/events"), sick + well, limit / 4, limit / 4, limit},
	} {
		t.Run(test.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var list []string
				for i := range sick + well {
					image := "busybox"
					if i < sick {
						image = "0123456789ab"
					}
					list = append(list, fmt.Sprintf(
						`{"Id":"%d","Names":["/c%[1]d"],"Image":"%s","Created":%[1]d,`+
							`"Status":"Up 3 weeks"}`, i, image))
				}
				var mu sync.Mutex // of the two below
				start, last := time.Now(), time.Duration(0)
				engine := func(w http.ResponseWriter, r *http.Request) {
					i, path := -1, r.URL.Path
					if _, err := fmt.Sscanf(path, "/containers/%d/", &i); err == nil && i >= sick &&
						strings.HasSuffix(path, "/stats") {
						mu.Lock()
						last = max(last, time.Since(start))
						mu.Unlock()
					}
					if takes := test.takes(path, i); takes > limit {
						<-r.Context().Done()
					} else if takes > 0 {
						time.Sleep(takes)
					}
					switch {
					case path == "/containers/json":
						io.WriteString(w, "["+strings.Join(list, ",")+"]")
					case strings.HasSuffix(path, "/stats"):
						io.WriteString(w, smallStats)
					case strings.HasSuffix(path, "/json"):
						io.WriteString(w, smallInspect)
					case path == "/info":
						io.WriteString(w, `{"Name":"h"}`)
					}
				}
				c, _ := collecting(t, "http://engine.test", limit)
				c.engine.client.HTTPClient.Transport = inBubble(engine)
				c.containers.rules = mustRules(t, test.rule)
				for sweep, most := range []time.Duration{test.first, test.later} {
					mu.Lock()
					start, last = time.Now(), 0
					mu.Unlock()
					result := c.sweep(t.Context())
					if took := time.Since(start); last > most || took > test.ends ||
						result.sampled != test.sampled {
						t.Errorf("sweep %d asked the last after %s, took %s; %d were sampled",
							sweep+1, last, took, result.sampled)
					}
					time.Sleep(time.Minute)
				}
			})
		})
	}
}

// Trouble that comes and goes with each poll, or has another text each time, is some lines an hour,
// and what the log has said in the end is so.
func TestTroubleThatComesAndGoes(t *testing.T) {
	const poll = 10 * time.Second
	hourOf := func(t *testing.T, path string, trouble func(sweep int) string) (lines []string) {
		synctest.Test(t, func(t *testing.T) {
			sweep := 0
			well := map[string]string{"/_ping": "OK", "/info": `{"Name":"h"}`, "/events": "",
				"/containers/json":    `[{"Id":"1","Names":["/web"],"Status":"Up 3 weeks"}]`,
				"/containers/1/stats": smallStats, "/containers/1/json": smallInspect}
			c, log := collecting(t, "http://engine.test", 9*time.Second)
			answer := func(w http.ResponseWriter, r *http.Request) {
				if text := trouble(sweep); text != "" && r.URL.Path == path {
					w.WriteHeader(http.StatusTeapot)
					io.WriteString(w, text)
				}
				io.WriteString(w, well[r.URL.Path])
			}
			c.engine.client.HTTPClient.Transport = inBubble(answer)
			for ; sweep < 3*int(time.Hour/poll); sweep++ {
				c.about.askedAt = time.Time{} // /info, too
				c.sweep(t.Context())
				time.Sleep(poll)
			}
			lines = strings.Split(strings.TrimSpace(log.Take()), "\n")
		})
		return lines
	}
	comesAndGoes := func(sweep int) string { return []string{"", "no"}[sweep%2] }
	changes := func(sweep int) string { return fmt.Sprint("trouble ", sweep) }
	ends := func(sweep int) string { return []string{comesAndGoes(sweep), ""}[min(sweep/100, 1)] }
	for _, path := range []string{"/_ping", "/containers/json", "/info", "/events",
		"/containers/1/stats"} {
		for why, trouble := range map[string]func(int) string{"comes and goes": comesAndGoes,
			"changes": changes, "ends": ends} {
			lines := hourOf(t, path, trouble)
			last := lines[len(lines)-1]
			// Of these two, the end is not logged.
			isWell := strings.Contains(last, "level=INFO") || path == "/info" || path == "/events"
			if len(lines) > 3*maxNews+3 || why == "ends" && !isWell {
				t.Errorf("%s %s: %d lines in three hours, at last %s", path, why, len(lines), last)
			}
		}
	}
}

// Very many events are counted, or refused, but hold up nothing; and what came with the refused
// ones does not stop those to come.
func TestManyEvents(t *testing.T) {
	s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
	s.container("1", smallInspect, smallStats)
	of := func(n int, format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	const real = `{"status":"die","id":"c%[1]d","from":"busybox","Type":"container",` +
		`"Action":"die","Actor":{"ID":"c%[1]d",` +
		`"Attributes":{"exitCode":"0","image":"busybox","name":"n"}},"scope":"local",` +
		`"time":1795409680,"timeNano":1795409680000000000}` + "\n"
	c.sweep(t.Context())
	s.answers["/events"] = of(20_000, real)
	for range 2 {
		wants(t, "many", c.sweep(t.Context()), "h.events.die 20000")
	}
	s.answers["/events"] = strings.Repeat("\n", maxAnswer+1)
	asked := c.events.until
	wants(t, "too many", c.sweep(t.Context()), "h.events.die 20000", "web.memory.usage 1")
	if got := log.String(); !strings.Contains(got, "the answer has over 33554432 bytes") {
		t.Errorf("logged %s", got)
	}
	if c.events.until != asked {
		t.Error("it does not ask again for what it could not read")
	}
	s.answers["/events"] = of(2, real)
	wants(t, "later", c.sweep(t.Context()), "h.events.die 20000")
	if n := len(c.events.seen); n != 2 {
		t.Errorf("it keeps %d events", n)
	}
}

// What /info told once stays known, whatever it answers next: the host's name, and how many
// containers are stopped.
func TestInfoThatGetsWorse(t *testing.T) {
	own, _ := os.Hostname()
	s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"],"State":"running","Status":"Up 3 hours"},`+
		`{"Id":"2","Names":["/x"],"State":"exited","Status":"Exited (0) 3 hours ago"}]`)
	s.container("1", smallInspect, smallStats)
	handler, status := s.Config.Handler, http.StatusNotFound
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/info" && status != http.StatusOK {
			w.WriteHeader(status)
			return
		}
		handler.ServeHTTP(w, r)
	})
	for _, status = range []int{http.StatusNotFound, http.StatusBadGateway, http.StatusNotFound} {
		c.about.askedAt = time.Time{}
		wants(t, fmt.Sprint("/info answers ", status), c.sweep(t.Context()),
			graphiteNode(own)+".containers.stopped 1")
	}
	status = http.StatusOK
	for range 3 {
		c.about.askedAt = time.Time{}
		wants(t, "/info has no numbers", c.sweep(t.Context()), "h.containers.stopped 1")
	}
	s.answers["/info"] = `{}`
	c.about.askedAt = time.Time{}
	wants(t, "/info has no name", c.sweep(t.Context()), "h.containers.stopped 1")
}

// Where inspect fails after the stats came, they are sent, and nothing waits for it.
func TestStatsDoNotWaitForInspect(t *testing.T) {
	s, c, _ := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
	s.container("1", "", smallStats)
	handler, asked := s.Config.Handler, 0
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/containers/1/json" {
			asked++
			w.WriteHeader(http.StatusInternalServerError)
		}
		handler.ServeHTTP(w, r)
	})
	result := c.sweep(t.Context())
	wants(t, "inspect fails", result, "web.memory.usage 1", "!web.uptime", "h.metrics.failed 1")
	if asked != 1 {
		t.Errorf("inspect was asked %d times", asked)
	}
}

// A container in a restart loop, or without a name, does not make the engine suspect.
func TestOnlyConnectionsMakeTheEngineSuspect(t *testing.T) {
	s, c, _ := newSmall(t, `[{"Id":"1","Names":["/a"],"State":"restarting",`+
		`"Status":"Restarting (1) 2 seconds ago"}]`)
	s.container("1", `{"State":{"Running":true,"Restarting":true}}`, `{}`)
	handler, pings := s.Config.Handler, new(atomic.Int32)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			pings.Add(1)
		}
		handler.ServeHTTP(w, r)
	})
	for range 5 {
		c.sweep(t.Context())
	}
	if pings.Load() != 1 {
		t.Errorf("%d pings", pings.Load())
	}
}
