package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
)

// oneContainer returns what is done for one container in each sweep, step by step.
func oneContainer(t testing.TB) (decode, flatten, name, encoding func()) {
	body, err := os.ReadFile("testdata/engine/cgroup1/stats-one-shot-busy.json")
	if err != nil {
		t.Fatal(err)
	}
	s, err := decodeStats(body)
	if err != nil {
		t.Fatal(err)
	}
	var f flattener
	rs := mustRules(t, `{"regexp":"(.*)\\..*\\.(.*)\\..*","into":"$1.$2"}`)
	who := subject{name: "my.container.name.x"}
	decode = func() { decodeStats(body) }
	flatten = func() {
		f.metrics = f.metrics[:0]
		s.flatten(&f, "my.name", origin{}, details{})
	}
	flatten()
	name = func() { rs.apply(who, "h") }
	encoding = func() { encode(f.metrics) }
	return decode, flatten, name, encoding
}

// Names are made once in a container's life, and are not among the costs of a sweep.
func TestAllocationsOfAContainer(t *testing.T) {
	decode, flatten, _, encoding := oneContainer(t)
	if n := testing.AllocsPerRun(100, func() { decode(); flatten(); encoding() }); n > 40 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, flatten); n > 0 {
		t.Errorf("%v allocations to flatten", n)
	}
}

func BenchmarkContainer(b *testing.B) {
	decode, flatten, name, encoding := oneContainer(b)
	for _, step := range []struct {
		name string
		do   func()
	}{{"decode", decode}, {"flatten", flatten}, {"name", name}, {"encode", encoding}} {
		b.Run(step.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				step.do()
			}
		})
	}
}

// BenchmarkSweep is a whole sweep, from the list to the accepted POST, of an engine that answers at once. The engine and
// the stand-in are in the same process: see BenchmarkAgainstTheFloor for what is ours. Its use is the profile.
func BenchmarkSweep(b *testing.B) {
	const n = 1000
	e, err := newEngine(replayCrowd(b, n, 0), 10*time.Second)
	if err != nil {
		b.Fatal(err)
	}
	s := newStandIn(b)
	s.set("", answerWith(http.StatusOK, "ok"))
	target := mustBackstop(b, s.URL+"/publish/docker")
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	c := newCollector(e, nil, log)
	q, _ := newRig(b, destination{"Backstop", target.post}, 256<<20, "")
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

// floor is a command of its own, so that its costs can be told from all others: it asks the engine for what a sweep
// asks, at each tick, and writes how long that took, in ns.
func floor() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1) // as main does, and for its reason
	}
	address := flag.String("docker", "", "")
	poll := flag.Duration("poll", time.Second, "")
	var f flow
	flag.IntVar(&f.limit, "concurrency", 0, "")
	flag.Parse()
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	e, err := newEngine(*address, 30*time.Second)
	fail(err)
	_, err = e.hello(context.Background())
	fail(err)
	list, err := e.list(context.Background())
	fail(err)
	ask := func(path string) {
		resp, err := e.client.HTTPClient.Get(e.base + path)
		fail(err)
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	query := "/stats?stream=false"
	if e.oneShot {
		query += "&one-shot=true"
	}
	for tick := time.Now(); ; tick = tick.Add(*poll) {
		time.Sleep(time.Until(tick))
		start := time.Now()
		ask("/containers/json")
		var wait sync.WaitGroup
		wait.Go(func() { ask("/info") })
		f.run(len(list), func(i int) { ask("/containers/" + list[i].ID + query) })
		wait.Wait()
		fmt.Printf("%dns\n", time.Since(start).Nanoseconds())
	}
}
