package main

import (
	"cmp"
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
	// maxTick is how long engines wait that answer in ticks, however few are asked.
	maxTick = 2 * time.Second
)

// flow limits the calls in flight. It begins with a few, and doubles that whenever there is no
// answer for a while.
type flow struct {
	limit int // fixed number of calls, 0 to find it out
	most  int // that were not too many, 0 if it is not known
	peak  int // that were in flight the last time
}

// run calls do with 0 to n-1, each in its own goroutine, and returns when all are done. It begins
// with all if the engine is known to answer in ticks.
func (f *flow) run(n int, inTicks bool, do func(i int)) {
	most := cmp.Or(f.limit, f.most, maxInFlight)
	allowed := min(fewInFlight, most)
	if f.limit > 0 || inTicks {
		allowed = most
	}
	answers, inFlight := make(chan struct{}, n), 0
	f.peak = 0
	for i := range n {
		for inFlight >= allowed {
			select {
			case <-answers:
				inFlight--
			case <-time.After(silence):
				allowed = min(2*allowed, most)
			}
		}
		inFlight++
		f.peak = max(f.peak, inFlight)
		go func() {
			do(i)
			answers <- struct{}{}
		}()
	}
	for range inFlight {
		<-answers
	}
}

// adapt takes note of the last run: whether calls timed out, and how many others were answered
// after how long, all added up. Where these had to wait, too, there were too many: at most half as
// many are in flight the next time, and no more than the engine can do in a fifth of limit. After
// that it is one more each time, as long as they wait no longer than for a tick.
func (f *flow) adapt(late bool, answered int, waited, limit time.Duration) {
	switch average := waited / time.Duration(max(answered, 1)); {
	case late && answered == 0: // do not make it much worse if all of them hang
		f.most = max(f.peak/2, fewInFlight)
	case late && average > max(limit/4, maxTick):
		f.most = max(min(f.peak/2, answered/5), 1)
	case f.most > 0 && average < maxTick:
		f.most = min(f.most+1, maxInFlight)
	}
}
