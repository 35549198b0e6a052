package main

import (
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
