package main

import (
	"context"
	"hash/fnv"
	"log/slog"
	"time"
)

// schedule is when sweeps run: at the multiples of every since the Unix epoch, shifted by offset.
// So each sweep falls into its own Graphite slot, at any resolution that every is a multiple of.
type schedule struct {
	every  time.Duration
	offset time.Duration
}

// newSchedule derives the offset from the host's name. It is the same at every start, so points
// stay evenly spaced, and differs between hosts, so they do not all post to Backstop at the same
// time. It is in the first half of the interval: the sweep itself must end in the same slot.
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
	// Round strips the monotonic reading: the schedule goes by the wall clock.
	return t.Round(0).Add(s.every - time.Duration(into))
}

// next returns the tick to wait for at now, after a sweep on tick.
func (s schedule) next(tick, now time.Time) time.Time {
	// A timer can fire a little early when the wall clock is slewed. The same tick must not be
	// served twice. A tick that is further ahead is from before the clock was set back: ignore it.
	if ahead := tick.Sub(now.Round(0)); ahead > 0 && ahead < s.every/2 {
		now = tick
	}
	return s.after(now)
}

// slowFor is how long polls have to be in time until the log says that they are.
const slowFor = time.Minute

// poll calls sweep at once and then at each tick, until ctx ends. Ticks that pass during a sweep
// are skipped. The log says so once, and when that is over. poll asks for the current schedule
// after each sweep, because it depends on the host's name, which the first sweep may find out.
func poll(ctx context.Context, current func() schedule, sweep func(context.Context),
	log *slog.Logger) {
	var slow time.Time // when a sweep last took too long, zero if that is over
	for tick := time.Now().Round(0); ; {
		start := time.Now()
		sweep(ctx)
		took := time.Since(start)
		if ctx.Err() != nil {
			return
		}
		s := current()
		// The first sweep is on no tick: it may pass one without being too slow.
		switch {
		case took >= s.every:
			if slow.IsZero() {
				log.Warn("a poll took longer than --poll, skipping polls: make --poll longer",
					"took", took.Round(time.Millisecond), "poll", s.every,
					"skipped", int(took/s.every))
			}
			slow = time.Now()
		case !slow.IsZero() && time.Since(slow) > max(slowFor, 2*s.every):
			slow = time.Time{}
			log.Info("polls are in time again")
		}
		now := time.Now()
		tick = s.next(tick, now)
		select {
		case <-time.After(tick.Sub(now.Round(0))):
		case <-ctx.Done():
			return
		}
	}
}
