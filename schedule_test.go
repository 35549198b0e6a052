package main

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

func TestScheduleIsAGrid(t *testing.T) {
	s := schedule{every: time.Minute, offset: 7 * time.Second}
	at := func(clock string) time.Time {
		t.Helper()
		at, err := time.Parse("15:04:05.999", clock)
		if err != nil {
			t.Fatal(err)
		}
		return at.AddDate(2026, 0, 0)
	}
	for _, test := range []struct{ now, want string }{
		{"12:00:00", "12:00:07"},
		{"12:00:06.999", "12:00:07"},
		{"12:00:07", "12:01:07"},
		{"12:00:59", "12:01:07"},
	} {
		if got := s.after(at(test.now)); !got.Equal(at(test.want)) {
			t.Errorf("after %s comes %s, want %s", test.now, got, test.want)
		}
	}
	if got := (schedule{every: time.Minute}).after(time.Unix(-90, 0)); !got.Equal(time.Unix(-60, 0)) {
		t.Errorf("after -90 s comes %s", got) // a clock that was never set
	}

	for _, test := range []struct{ why, tick, now, want string }{
		{"as usual", "12:00:07", "12:00:09", "12:01:07"},
		{"overrun", "12:00:07", "12:02:09", "12:03:07"},
		{"the timer was early", "12:01:07", "12:01:06.999", "12:02:07"},
		{"the clock was put back", "12:01:07", "11:30:00", "11:30:07"},
	} {
		if got := s.next(at(test.tick), at(test.now)); !got.Equal(at(test.want)) {
			t.Errorf("%s: after %s at %s comes %s, want %s", test.why, test.tick, test.now, got, test.want)
		}
	}
}

func TestHostsArePlacedInTheFirstHalf(t *testing.T) {
	quarters := [4]int{}
	for i := range 200 {
		host := "web" + strings.Repeat("x", i/10) + string(rune('0'+i%10))
		s := newSchedule(time.Minute, host)
		if s != newSchedule(time.Minute, host) {
			t.Fatalf("%s has two places", host)
		}
		if s.offset < 0 || s.offset >= 30*time.Second {
			t.Fatalf("%s has the offset %s", host, s.offset)
		}
		quarters[s.offset*4/(30*time.Second)]++
	}
	for i, n := range quarters {
		if n < 25 { // of 50; a hash that is worth its name does not miss that
			t.Errorf("%d of 200 hosts in quarter %d of the offsets", n, i)
		}
	}
	newSchedule(time.Nanosecond, "h").after(time.Now()) // has no half
}

// In the time of synctest, which begins at midnight UTC.
func TestPollKeepsToTheGrid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(3 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		s := schedule{every: time.Minute, offset: 10 * time.Second}
		took := []time.Duration{time.Second, time.Second, 130 * time.Second, time.Second}
		midnight := time.Now().Truncate(24 * time.Hour)
		var starts []time.Duration
		log := &harness.Log{}
		poll(ctx, func() schedule { return s }, func(context.Context) {
			starts = append(starts, time.Since(midnight))
			time.Sleep(took[len(starts)-1])
			if len(starts) == len(took) {
				cancel()
			}
		}, log.Logger())
		want := []time.Duration{3 * time.Second, 10 * time.Second, 70 * time.Second, 250 * time.Second}
		for i := range want {
			if starts[i] != want[i] {
				t.Fatalf("sweeps at %v, want %v", starts, want)
			}
		}
		if got := log.Take(); strings.Count(got, "\n") != 1 ||
			!strings.Contains(got, "took=2m10s poll=1m0s skipped=2") {
			t.Errorf("logged: %s", got)
		}
	})
}

// A first sweep is on no tick, so that one may pass without anything being amiss.
func TestPollDoesNotBlameTheFirstSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(59 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		log, sweeps := &harness.Log{}, 0
		poll(ctx, func() schedule { return schedule{every: time.Minute} }, func(context.Context) {
			time.Sleep(2 * time.Second)
			if sweeps++; sweeps == 2 {
				cancel()
			}
		}, log.Logger())
		if got := log.Take(); got != "" {
			t.Errorf("logged: %s", got)
		}
	})
}

// Sweeps that are too slow, all or now and then, are one line of the log, and so is their end.
func TestSlowSweepsAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		log, sweeps := &harness.Log{}, 0
		poll(ctx, func() schedule { return schedule{every: time.Second} }, func(context.Context) {
			sweeps++
			switch {
			case sweeps == 2000:
				cancel()
			case sweeps < 1000 && sweeps%3 > 0:
				time.Sleep(2 * time.Second)
			}
		}, log.Logger())
		got := log.Take()
		if strings.Count(got, "\n") != 2 || !strings.Contains(got, "a poll took longer") ||
			!strings.Contains(got, `level=INFO msg="polls are in time again"`) {
			t.Errorf("logged:\n%s", got)
		}
	})
}
