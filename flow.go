package main

import (
	"sync"
	"time"
)

// How many calls to the engine are in flight at the same time, as far as nobody says. Engines that answer at once gain nothing by more than a
// few, and a small host suffers from more. Others answer at the next tick of a collector that runs
// every second, all calls that have come by then: there, all have to be in flight at once, or a sweep takes
// as many seconds as there are turns.
const (
	fewInFlight = 16
	// maxInFlight keeps the number of open files within the usual limit of 1,024.
	maxInFlight = 512
	// stall is how long no call is answered until more are sent out. An engine that answers at once does so in a
	// few milliseconds.
	stall = 20 * time.Millisecond
	// silence is how long no call is answered, with several under way, where an engine does not answer at once.
	silence = 100 * time.Millisecond
	// patience is how many sweeps without such a silence it takes until an engine is trusted to answer at once: a sweep that
	// begins just before a tick knows no silence.
	patience = 10
)

// flow admits calls to the engine. It begins with a few, and doubles that whenever there is no answer for a while; where
// that is no exception, it begins with all.
type flow struct {
	limit int // where it is not to be found out, 0 elsewhere
	all   int // for how many sweeps still all are asked at once, if there is no silence
}

// run calls do with 0 to n-1, each in a goroutine of its own, and returns when all are done.
func (f *flow) run(n int, do func(i int)) {
	most, allowed := maxInFlight, fewInFlight
	if f.limit > 0 {
		most, allowed = f.limit, f.limit
	}
	if f.all > 0 {
		f.all--
		allowed = most
	}
	var (
		wait     sync.WaitGroup
		answers  = make(chan struct{}, n)
		timer    = time.NewTimer(stall)
		inFlight = 0
		last     = time.Now() // when there was the last answer
		answered = func() {
			if time.Since(last) > silence && inFlight >= fewInFlight/2 { // fewer may be some that hang
				f.all = patience
			}
			last = time.Now()
			inFlight--
		}
	)
	defer timer.Stop()
	for i := range n {
		for inFlight >= allowed {
			timer.Reset(stall)
			select {
			case <-answers:
				answered()
			case <-timer.C:
				if allowed < most {
					allowed = min(2*allowed, most)
				} else {
					<-answers
					answered()
				}
			}
		}
		inFlight++
		wait.Go(func() {
			do(i)
			answers <- struct{}{}
		})
	}
	for inFlight > 0 {
		<-answers
		answered()
	}
	wait.Wait()
}
