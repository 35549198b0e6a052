package main

import (
	"context"
	"hash/fnv"
	"log/slog"
	"time"
)

// schedule is the grid that sweeps run on: the multiples of every since the
// Unix epoch, shifted by offset. On that grid each sweep falls into a Graphite
// slot of its own, at any resolution that every is a multiple of.
type schedule struct {
	every  time.Duration
	offset time.Duration
}

// newSchedule gives the named host its place in the first half of the interval:
// the same one at every start, so that its points stay evenly spaced, and another
// one than its neighbours', so that a fleet does not post to Backstop at one
// instant. The second half is left to the sweep itself, whose answers have to
// fall into the same slot.
func newSchedule(every time.Duration, host string) schedule {
	hash := fnv.New64a()
	hash.Write([]byte(host))
	half := max(uint64(every/2), 1)
	return schedule{every, time.Duration(hash.Sum64() % half)}
}

// after returns the first tick later than t.
func (s schedule) after(t time.Time) time.Time {
	into := (t.UnixNano() - int64(s.offset)) % int64(s.every)
	if into < 0 {
		into += int64(s.every)
	}
	// Without its monotonic reading, since the grid is one of the wall clock.
	return t.Round(0).Add(s.every - time.Duration(into))
}

// missed counts the ticks in (t, t+took].
func (s schedule) missed(t time.Time, took time.Duration) int {
	first := s.after(t)
	end := t.Round(0).Add(took)
	if end.Before(first) {
		return 0
	}
	return 1 + int(end.Sub(first)/s.every)
}

// next returns the tick to wait for at now, after a sweep on tick.
func (s schedule) next(tick, now time.Time) time.Time {
	// A timer can fire a little ahead of the wall clock when that is being slewed;
	// the tick just served must not be served again. A tick that lies further
	// ahead was set before the clock was put back, and counts no more.
	if ahead := tick.Sub(now.Round(0)); ahead > 0 && ahead < s.every/2 {
		now = tick
	}
	return s.after(now)
}

// poll calls sweep at once and then at each tick, until ctx ends; one sweep at a
// time. Ticks that pass during a sweep are skipped, and the log says so.
// The schedule is asked for again after each sweep, as the host's name, on which
// it depends, may only then be known.
func poll(ctx context.Context, current func() schedule, sweep func(context.Context), log *slog.Logger) {
	for tick := time.Now().Round(0); ; {
		start := time.Now()
		sweep(ctx)
		took := time.Since(start)
		if ctx.Err() != nil {
			return
		}
		s := current()
		// The first sweep, which is on no tick, may run over one without being too slow.
		if took >= s.every {
			log.Warn("the sweep took longer than the poll interval, so polls were skipped; a longer --poll avoids that",
				"took", took.Round(time.Millisecond), "poll", s.every, "skipped", s.missed(tick, took))
		}
		now := time.Now()
		tick = s.next(tick, now)
		timer := time.NewTimer(tick.Sub(now.Round(0)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}
