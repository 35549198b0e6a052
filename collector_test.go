package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
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
	want := strings.ReplaceAll(string(golden), "c.", "shop.busy.")
	want = strings.ReplaceAll(want, " 1795409680\n", fmt.Sprintf(" %d\n", result.start.Unix()))
	if !strings.Contains(lines, want) {
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
	want = `level=INFO msg="Docker engine answers" engine="Docker/20.10.24 (linux)" ` +
		`api=1.41 one_shot=true host=vmtest running=6
`
	if got := log.Take(); got != want {
		t.Errorf("logged\n%swant\n%s", got, want)
	}
	result = c.sweep(t.Context())
	if got := log.Take(); got != "" || result.failed != 0 || result.running != 5 {
		t.Errorf("a second time, %d of %d failed, it logged\n%s", result.failed, result.running, got)
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
		if result.err != nil || !strings.Contains(lines, "\n"+graphiteNode(own)+".containers.total ") ||
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

// A host that comes to be known by another name is so in ${host}.
func TestHostInPaths(t *testing.T) {
	c := newCollector(nil, mustRules(t, `{"regexp":"(.*)","into":"${host}.$1"}`),
		(&harness.Log{}).Logger())
	list := []listed{{ID: "1", Names: []string{"/web"}}}
	for _, host := range []string{"one", "two.example"} {
		c.about.Name = host
		if found := censusOf(&c.containers, list, c.hostName()); len(found.asked) != 1 ||
			found.asked[0].path != graphiteNode(host)+".web" {
			t.Errorf("on %s: %+v", host, found.asked[0])
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
		"is not JSON": {ok(`<html>`), failed + `"its stats answer is not what was asked for: ` +
			`invalid character '<' looking for beginning of value"`},
		"is cut": {ok(`{"read":"2026-11-23T`), failed + `"its stats answer is not what was asked for: ` +
			`unexpected EOF"`},
		"is huge": {ok(strings.Repeat(" ", 50<<20)), failed + `"the answer has over 32 MiB"`},
		"is deep": {ok(`{"read":` + strings.Repeat("[", 20_000)),
			failed + `"its stats answer is not what was asked for: invalid character '[' exceeded max depth"`},
		"has no time": {ok(`{"message":"oops"}`), failed + `"its stats answer has no time of reading"`},
		"is an array": {ok(`[]`), failed + `"its stats answer is not what was asked for: ` +
			`an array instead of an object"`},
		"hangs up": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			failed + `EOF`},
		"fails": {harness.AnswerWith(500, `{"message":"device or resource busy"}`),
			failed + `"API error (500): device or resource busy"`},
		"says nothing": {ok(`{"read":"0001-01-01T00:00:00Z","memory_stats":{"usage":1}}`),
			failed + `"its stats answer is empty"`},
		"says nothing, Podman": {ok(``), failed + `"its stats answer is empty"`},
		"is in conflict": {harness.AnswerWith(409, `{"message":"busy"}`),
			failed + `"API error (409): busy"`},
		"is not found, but runs": {harness.AnswerWith(404, `no page`),
			failed + `"API error (404): no page"`},
		"was removed, but is listed": {harness.AnswerWith(404, `{}`), failed + `"the engine's list has ` +
			`it, poll after poll, but the engine does not know it or says that it stopped"`},
	} {
		t.Run(why, func(t *testing.T) {
			t.Parallel()
			wantFailed := strings.Count(test.log, failed)
			r := harness.NewReplay(t, "cgroup2")
			r.On("/containers/fx-web/stats", r.Serve("stats-one-shot-idle.json"))
			r.On("/containers/fx-web/json", r.Serve("inspect-idle.json"))
			limit := 2 * time.Second
			if why == "is huge" {
				limit = time.Minute // a busy machine takes its time for it
			}
			c, log := collecting(t, r.URL, limit)
			well := c.sweep(t.Context())
			log.Take()

			r.On("/containers/fx-two/stats", test.answer)
			isGone := why == "was removed, but is listed"
			if isGone {
				r.On("/containers/fx-two/json", test.answer)
			}
			for sweep := range 2 {
				wantFailed := wantFailed
				if isGone && sweep == 0 {
					wantFailed = 0 // it may just have ended
				}
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
				// What inspect told before is known all the same.
				for _, own := range regexp.MustCompile(`fx-two\.(\S+)`).FindAllStringSubmatch(lines, -1) {
					if !slices.Contains([]string{"uptime", "restarts", "oom_kills", "failed_exits"}, own[1]) {
						t.Errorf("it still has %s", own[0])
					}
				}
				hasUptime := strings.Contains("\n"+lines, "\nfx-two.uptime ")
				if hasUptime == isGone {
					t.Errorf("its uptime is sent: %t", hasUptime)
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
	up := func() {
		r.Well()
		r.On("/containers/fx-web/stats", r.Serve("stats-one-shot-idle.json"))
		r.On("/containers/fx-web/json", r.Serve("inspect-idle.json"))
	}
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

// An engine's clock can be off by hours. All points of a poll have the time at which it began;
// uptime goes by the engine's clock, and so do the questions for events.
func TestEngineWithAnotherClock(t *testing.T) {
	for _, ahead := range []time.Duration{
		0, 20 * time.Second, 2 * time.Hour, -3 * time.Hour, -50 * 365 * 24 * time.Hour,
	} {
		s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 1 minute"}]`)
		handler := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			now := time.Now().Add(ahead)
			w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
			s.container("1", `{"State":{"Running":true,"StartedAt":"`+
				now.Add(-time.Minute).Format(time.RFC3339Nano)+`"}}`,
				`{"read":"`+now.Format(time.RFC3339Nano)+`","pids_stats":{"current":3}}`)
			if r.URL.Path == "/events" {
				until := number(r.URL.Query().Get("until"))
				if until > now.Unix() || until < now.Unix()-1 {
					t.Errorf("events are asked up to %d, it is %d", until, now.Unix())
				}
			}
			handler.ServeHTTP(w, r)
		})
		for range 2 {
			before := time.Now().Unix()
			result := c.sweep(t.Context())
			lines := asLines(result.metrics)
			isOld := ahead < -20*365*24*time.Hour // then the start is not known
			if !isOld && !regexp.MustCompile(`(?m)^web\.uptime (59|60) `).MatchString(lines) ||
				!strings.Contains(lines, "web.pids.current 3 ") {
				t.Errorf("ahead by %s\n%s", ahead, lines)
			}
			for _, m := range result.metrics {
				if m.time != result.metrics[0].time || m.time < before || m.time > before+1 {
					t.Errorf("ahead by %s, %s is of %d, the poll began at %d",
						ahead, m.name(), m.time, before)
				}
			}
		}
		if got := log.Take(); strings.Contains(got, "level=WARN") {
			t.Errorf("ahead by %s, it logged %s", ahead, got)
		}
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
				time.Sleep(time.Until(noClock)) // a bubble's clock begins in 2000
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
			time.Sleep(time.Until(noClock)) // a bubble's clock begins in 2000
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
			for begun := time.Now(); time.Since(begun) < 3*time.Hour-poll; sweep++ {
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

// While the host's clock is not set, there are no points: they would be of a time before 2013.
func TestNoPollBeforeTheClockIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		c, log := collecting(t, "http://engine.test", maxCall)
		c.engine.client.HTTPClient.Transport = inBubble(func(w http.ResponseWriter, r *http.Request) {
			asked++
			io.WriteString(w, map[string]string{"/containers/json": `[{"Id":"1","Names":["/web"]}]`,
				"/containers/1/stats": smallStats, "/containers/1/json": smallInspect,
				"/info": `{"Name":"h"}`}[r.URL.Path])
		})
		q, _ := newRig(t, destination{name: "Backstop"}, 1<<20, "")
		p := &pipeline{collector: c, queue: q.queue, delivery: q.delivery,
			service: newService(time.Hour, q.queue), log: c.log}
		for range 3 {
			result := p.sweep(t.Context())
			if result.err != errNoClock || len(result.metrics) > 0 || q.waiting() > 0 || asked > 0 {
				t.Errorf("in 2000: %v, %d questions, %d metrics", result.err, asked, q.waiting())
			}
			time.Sleep(time.Minute)
		}
		logged(t, log, 1, `level=ERROR msg="not polling: the clock of this host is not set" now=2000-01-01`)
		time.Sleep(time.Until(noClock) + time.Hour) // it is set
		result := p.sweep(t.Context())
		wants(t, "in 2013", result, "web.uptime 60", "h.metrics.sampled 1", "h.metrics.sent 0")
		for _, m := range result.metrics {
			if m.time < noClock.Unix() {
				t.Errorf("%s is of %s", m.name(), inUTC(m.time))
			}
		}
		logged(t, log, 1, `level=INFO msg="Docker engine answers"`)
	})
}
