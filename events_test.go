package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
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
	c.sweep(t.Context())
	s.answers["/events"] = of(20_000, real)
	for range 2 {
		wants(t, "many", c.sweep(t.Context()), "h.events.die 20000")
	}
	s.answers["/events"] = strings.Repeat("\n", maxAnswer+1)
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
