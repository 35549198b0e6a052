package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

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
				f.run(test.n, false, c.do)
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

// weakEngine does a few calls at a time; the others wait for their turn.
type weakEngine struct {
	turns  chan struct{}
	takes  time.Duration // a call
	list   string
	events int    // the status of /events
	server string // what it calls itself
	goesOn bool   // whether it also does calls whose caller has left
	hangs  string // a path that never answers, "" for none
	holds  bool   // whether that has a turn until its caller leaves
}

func (e *weakEngine) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, answered := r.Context(), make(chan *http.Response, 1)
	go func() {
		left, hangs := ctx.Done(), r.URL.Path == e.hangs
		if hangs && !e.holds {
			return
		}
		if e.goesOn {
			left = nil
		}
		select {
		case e.turns <- struct{}{}:
		case <-left:
			return
		}
		defer func() { <-e.turns }()
		if hangs {
			<-ctx.Done()
			return
		}
		time.Sleep(e.takes)
		w := httptest.NewRecorder()
		w.Header().Set("Server", e.server)
		w.Header().Set("Api-Version", "1.41")
		e.answer(w, r.URL.Path)
		answered <- w.Result()
	}()
	select {
	case resp := <-answered:
		return resp, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (e *weakEngine) answer(w http.ResponseWriter, path string) {
	switch {
	case path == "/containers/json":
		io.WriteString(w, e.list)
	case path == "/events":
		w.WriteHeader(e.events)
	case path == "/info":
		io.WriteString(w, `{"Name":"h"}`)
	case strings.HasSuffix(path, "/stats"):
		io.WriteString(w, smallStats)
	case strings.HasSuffix(path, "/json"):
		io.WriteString(w, smallInspect)
	}
}

// Our own calls are no load that makes an engine fail: from the second poll on, all containers are
// read, as often as it can, and a container that hangs is the only one that fails.
func TestWeakEngine(t *testing.T) {
	const half = 500 * time.Millisecond
	for _, test := range []struct {
		why        string
		containers int
		turns      int
		poll       time.Duration
		engine     weakEngine
		failed     int
		most       time.Duration // that a poll takes when all is known
	}{
		{"four calls at a time", 100, 4, 30 * time.Second, weakEngine{takes: half}, 0, 14 * time.Second},
		{"it does what nobody waits for", 100, 4, 30 * time.Second,
			weakEngine{takes: half, goesOn: true}, 0, 14 * time.Second},
		{"it has ticks", 100, 4, 30 * time.Second,
			weakEngine{takes: half, server: "Docker/20.10.24 (linux)"}, 0, 14 * time.Second},
		{"no events, so two calls each", 100, 4, 30 * time.Second,
			weakEngine{takes: half, events: 403}, 0, 27 * time.Second},
		{"one hangs", 100, 4, 30 * time.Second,
			weakEngine{takes: half, hangs: "/containers/7/stats"}, 1, 23 * time.Second},
		{"one hangs, and has a turn", 100, 4, 30 * time.Second,
			weakEngine{takes: half, hangs: "/containers/7/stats", holds: true}, 1, 23 * time.Second},
		{"four times as many", 400, 4, 2 * time.Minute, weakEngine{takes: half}, 0, 52 * time.Second},
		{"two at a time", 100, 2, time.Minute, weakEngine{takes: half}, 0, 27 * time.Second},
		{"one at a time", 50, 1, time.Minute, weakEngine{takes: half}, 0, 27 * time.Second},
		{"slow, but all at once", 100, 100, 30 * time.Second, weakEngine{takes: 3 * half}, 0,
			5 * time.Second},
	} {
		t.Run(test.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(noClock)) // a bubble's clock begins in 2000
				var list []string
				for i := range test.containers {
					list = append(list, fmt.Sprintf(`{"Id":"%d","Names":["/c%[1]d"],"Created":%[1]d,`+
						`"Status":"Up 3 weeks"}`, i))
				}
				e := test.engine
				e.turns, e.list = make(chan struct{}, test.turns), "["+strings.Join(list, ",")+"]"
				e.events = max(e.events, http.StatusOK)
				c, log := collecting(t, "http://engine.test", maxCall)
				c.engine.client.HTTPClient.Transport = &e
				begun := time.Now()
				for poll := range 30 {
					start := time.Now()
					result := c.sweep(t.Context())
					took := time.Since(start)
					if poll > 0 && (result.failed != test.failed ||
						result.sampled != test.containers-test.failed) {
						t.Errorf("poll %d: %d sampled, %d failed: %s",
							poll+1, result.sampled, result.failed, log.Take())
					}
					known := poll > 1 && time.Since(begun) < refresh // what only inspect tells
					if known && took > test.most {
						t.Errorf("poll %d took %s", poll+1, took)
					}
					time.Sleep(max(0, test.poll-took))
				}
			})
		})
	}
}

// Where calls time out, the next poll begins with half as many; then it grows again.
func TestFlowAdapts(t *testing.T) {
	const limit = 10 * time.Second
	for _, test := range []struct {
		why      string
		late     bool
		answered int
		average  time.Duration
		most     int // after a run of 100 at a time
	}{
		{"well", false, 100, time.Millisecond, 0},
		{"slow", false, 100, 8 * time.Second, 0},
		{"one hangs", true, 99, time.Millisecond, 0},
		{"nearly all hang", true, 1, time.Millisecond, 0},
		{"some hang on an engine with ticks", true, 50, 1500 * time.Millisecond, 0},
		{"too many at a time", true, 80, 5 * time.Second, 16},
		{"a little too many", true, 300, 3 * time.Second, 50},
		{"far too many", true, 3, 9 * time.Second, 1},
		{"no answer at all", true, 0, 0, 50},
	} {
		f := flow{peak: 100}
		f.adapt(test.late, test.answered, time.Duration(test.answered)*test.average, limit)
		if f.most != test.most {
			t.Errorf("%s: %d at a time, want %d", test.why, f.most, test.most)
		}
	}
	f := flow{peak: 100}
	f.adapt(true, 0, 0, limit)
	for range 10 {
		f.adapt(false, 100, 100*time.Millisecond, limit)
	}
	if f.most != 60 {
		t.Errorf("after ten good runs it is %d", f.most)
	}
	f = flow{peak: 8}
	if f.adapt(true, 0, 0, limit); f.most != fewInFlight {
		t.Errorf("where a few hang, it is %d", f.most)
	}
	f = flow{limit: 7} // as it is told
	f.run(100, true, func(int) {})
	f.adapt(true, 10, 90*time.Second, limit)
	if f.run(100, true, func(int) { time.Sleep(time.Millisecond) }); f.peak != 7 {
		t.Errorf("with --concurrency=7 it is %d", f.peak)
	}
}
