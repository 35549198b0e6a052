package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

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
		at := time.Unix(0, one.TimeNano).Unix()
		if q := r.URL.Query(); at >= number(q.Get("since")) && at <= number(q.Get("until")) {
			fmt.Fprintln(w, text)
		}
	}
}

// number returns a whole number of seconds, or stops the test: so do engines up to Docker 1.9.
func number(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
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
		wants(t, "refused", result, "!vmtest.events.", "vmtest.containers.total 5")
	}
	if got := log.Take(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, "/events") {
		t.Errorf("refused, it logged %s", got)
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
	c.engine.timeout = time.Minute // also with the race detector
	c.sweep(t.Context())
	s.answers["/events"] = of(20_000, real)
	for range 2 {
		wants(t, "many", c.sweep(t.Context()), "h.events.die 20000")
	}
	s.answers["/events"] = `{"Type":"` + strings.Repeat("x", maxAnswer)
	asked := c.events.until
	wants(t, "too many", c.sweep(t.Context()), "h.events.die 20000", "web.memory.usage 1")
	if got := log.String(); !strings.Contains(got, "the answer has over 32 MiB") {
		t.Errorf("logged %s", got)
	}
	if c.events.until != asked {
		t.Error("it does not ask again for what it could not read")
	}
	s.answers["/events"] = of(2, real)
	wants(t, "later", c.sweep(t.Context()), "h.events.die 20000")
	if n := len(c.events.heard); n != 2 {
		t.Errorf("it keeps %d events", n)
	}
}

// What was not read is not 0: the figures of events begin with the first answer.
func TestEventsBeginWithTheFirstAnswer(t *testing.T) {
	const old = `{"message":"strconv.ParseInt: parsing \"1795409680.5\": invalid syntax"}`
	for why, answer := range map[string]http.HandlerFunc{
		"fails":              harness.AnswerWith(500, `{"message":"x"}`),
		"fails, old":         harness.AnswerWith(500, old),
		"is not there":       harness.AnswerWith(404, `{"message":"page not found"}`),
		"is forbidden":       harness.AnswerWith(403, ""),
		"is busy":            harness.AnswerWith(503, ""),
		"redirects":          harness.AnswerWith(302, ""),
		"hangs":              harness.Hang,
		"hangs up":           func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"is a page":          harness.AnswerWith(200, "<html>"),
		"is an array":        harness.AnswerWith(200, "[]"),
		"is text":            harness.AnswerWith(200, `"ok"`),
		"is a broken object": harness.AnswerWith(200, `{"Type":"container"`),
	} {
		t.Run(why, func(t *testing.T) {
			t.Parallel()
			s, c, log := newSmall(t, `[{"Id":"1","Names":["/web"],"Status":"Up 3 hours"}]`)
			s.container("1", smallInspect, smallStats)
			handler, isWell, past := s.Config.Handler, false, &pastEvents{}
			s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.URL.Path != "/events":
					handler.ServeHTTP(w, r)
				case isWell:
					past.ServeHTTP(w, r)
				default:
					answer(w, r)
				}
			})
			c.engine.timeout = 4 * time.Second
			past.add("1", "die", `"name":"web","exitCode":"1"`, time.Now().Add(-time.Second))
			for range 3 {
				wants(t, why, c.sweep(t.Context()), "!h.events.", "!web.oom_kills", "!web.failed_exits",
					"web.uptime 60", "web.restarts 3", "h.metrics.sampled 1")
			}
			if got := log.Take(); strings.Count(got, "level=WARN") != 1 {
				t.Errorf("it logged %s", got)
			}
			isWell = true
			wants(t, why+", then well", c.sweep(t.Context()), "h.events.start 0", "h.events.die 0",
				"h.events.die_nonzero 0", "h.events.oom 0", "h.events.unhealthy 0", "web.oom_kills 0",
				"web.failed_exits 0")
			past.add("1", "die", `"name":"web","exitCode":"2"`, time.Now())
			time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
			wants(t, why+", then one ends", c.sweep(t.Context()), "h.events.die 1",
				"h.events.die_nonzero 1", "web.failed_exits 1", "web.oom_kills 0")
		})
	}
}

// An engine up to Docker 1.9 reads whole numbers only.
func TestEventsAreAskedForInWholeSeconds(t *testing.T) {
	s, c, _ := newSmall(t, `[]`)
	handler := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"since", "until"} {
			text := r.URL.Query().Get(name)
			if _, err := strconv.ParseInt(text, 10, 64); err != nil && r.URL.Path == "/events" {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
		handler.ServeHTTP(w, r)
	})
	for range 2 {
		wants(t, "whole seconds", c.sweep(t.Context()), "h.events.die 0")
	}
}

// A stream of events that stays open tells the same as one that ends, each event once.
func TestEventsThatStayOpen(t *testing.T) {
	for why, isOpen := range map[string]func(poll int) bool{
		"always":     func(int) bool { return true },
		"never":      func(int) bool { return false },
		"now":        func(poll int) bool { return poll%2 == 0 },
		"then":       func(poll int) bool { return poll%2 == 1 },
		"after some": func(poll int) bool { return poll > 2 },
	} {
		t.Run(why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex // of what follows
				past, poll, ahead, live := &pastEvents{}, 0, 5*time.Hour, ""
				now := func() time.Time { return time.Now().Add(ahead) } // its clock
				_, c, log := engineInBubble(t, maxCall, func(w http.ResponseWriter, r *http.Request) {
					mu.Lock()
					w.Header().Set("Date", now().UTC().Format(http.TimeFormat))
					text := map[string]string{"/info": `{"Name":"h"}`, "/containers/json": `[]`}[r.URL.Path]
					io.WriteString(w, text)
					stays, id := r.URL.Path == "/events" && isOpen(poll), live
					if r.URL.Path == "/events" {
						past.ServeHTTP(w, r)
					}
					mu.Unlock()
					if !stays {
						return
					}
					w.(http.Flusher).Flush()
					if id != "" {
						time.Sleep(linger / 2)
						mu.Lock()
						past.add(id, "start", ``, now())
						io.WriteString(w, past.all[len(past.all)-1])
						mu.Unlock()
						w.(http.Flusher).Flush()
					}
					<-r.Context().Done()
				})
				starts := 0
				expect := func(what string) {
					t.Helper()
					start := time.Now()
					wants(t, fmt.Sprintf("%s, poll %d", what, poll), c.sweep(t.Context()),
						fmt.Sprintf("h.events.start %d", starts))
					if took := time.Since(start); took > 4*linger {
						t.Errorf("%s took %s", what, took)
					}
					time.Sleep(10*time.Second - time.Since(start))
					mu.Lock()
					defer mu.Unlock()
					poll++
				}
				add := func(ago ...time.Duration) {
					mu.Lock()
					defer mu.Unlock()
					for _, ago := range ago {
						past.add(fmt.Sprint("c", len(past.all)), "start", ``, now().Add(-ago))
						starts++
					}
				}
				add(time.Minute, 3*time.Second, 1500*time.Millisecond, 0)
				starts = 0
				expect("at first")
				expect("nothing new")
				for range 6 {
					add(9*time.Second, 3500*time.Millisecond, 2200*time.Millisecond, 1100*time.Millisecond)
					expect("some")
				}
				for range 4 {
					expect("nothing new")
				}
				add(9 * time.Second)
				expect("one long ago")
				expect("nothing new")
				for range 4 {
					mu.Lock()
					if live = ""; isOpen(poll) {
						live = fmt.Sprint("live", poll)
						starts++
					}
					mu.Unlock()
					expect("while it listens")
				}
				mu.Lock()
				live = ""
				mu.Unlock()
				expect("nothing new")
				mu.Lock()
				ahead -= time.Hour // its clock is set back
				mu.Unlock()
				expect("set back")
				for range 4 {
					time.Sleep(30 * time.Second)
					add(25*time.Second, time.Second)
					expect("after that")
				}
				if got := log.Take(); strings.Contains(got, "level=WARN") ||
					strings.Count(got, "stays open")+strings.Count(got, "keeps /events open") > maxNews {
					t.Errorf("it logged %s", got)
				}
			})
		})
	}
}
