package main

import (
	"cmp"
	"sync"
	"time"
)

// Concurrency without --concurrency. Engines that answer at once gain nothing from more than a few
// calls, and small hosts suffer from more. Other engines collect once a second and then answer all
// calls that have come: there, all have to be in flight at once, or a sweep takes many seconds.
const (
	fewInFlight = 16
	// maxInFlight keeps the number of open files within the usual limit of 1,024.
	maxInFlight = 512
	// After a silence, more calls are sent. Engines that answer at once take a few milliseconds, or
	// some tens when they are busy: more calls would not help those.
	silence = 100 * time.Millisecond
	// After so many sweeps without much silence, an engine is trusted to answer at once. One is not
	// enough: a sweep that begins just before the engine's tick sees no silence.
	patience = 10
)

// flow limits the calls in flight. It begins with a few, and doubles that whenever there is no
// answer for a while. With an engine that answers at its ticks, it begins with all.
type flow struct {
	most  int // there are connections for, 0 for maxInFlight
	limit int // fixed number of calls, 0 to find it out
	all   int // sweeps left that begin with all
}

// inTicks says that the engine is known to answer once a second only.
func (f *flow) inTicks() { f.all = patience }

// run calls do with 0 to n-1, each in its own goroutine, and returns when all are done.
func (f *flow) run(n int, do func(i int)) {
	most := cmp.Or(f.most, maxInFlight)
	allowed := min(fewInFlight, most)
	if f.limit > 0 {
		most = min(f.limit, most)
		allowed = most
	}
	if f.all > 0 {
		f.all--
		allowed = most
	}
	var (
		wait     sync.WaitGroup
		answers  = make(chan struct{}, n)
		timer    = time.NewTimer(silence)
		inFlight = 0
		start    = time.Now()
		last     = start // when there was the last answer
		silent   time.Duration
		answered = func() {
			now := time.Now()
			if now.Sub(last) > silence && inFlight >= fewInFlight/2 { // fewer may just hang
				silent += now.Sub(last)
			}
			last = now
			inFlight--
		}
	)
	defer timer.Stop()
	for i := range n {
		for inFlight >= allowed {
			timer.Reset(silence)
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
	if silent > last.Sub(start)/2 { // one that is busy is silent now and then, too
		f.inTicks()
	}
}
