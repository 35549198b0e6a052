package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// The pause before a retry depends on the answer.
func TestDeliveryPace(t *testing.T) {
	const (
		fails   = "Backstop fails, keeping metrics"
		refuses = "Backstop refuses metrics, keeping them until this is fixed"
	)
	soon, late := 500*time.Millisecond, 1500*time.Millisecond
	for _, test := range []struct {
		err         error
		least, most time.Duration
		message     string
	}{
		{errors.New("connection refused"), soon, late, "Backstop unreachable, keeping metrics"},
		{&refusal{status: 500}, soon, late, fails},
		{&refusal{status: 408}, soon, late, fails},
		{&refusal{status: 503, retryAfter: 7 * time.Second}, 7 * time.Second, 8 * time.Second, fails},
		{&refusal{status: 429, retryAfter: time.Hour}, time.Hour, time.Hour + time.Second, fails},
		{&refusal{status: 401}, time.Minute, time.Minute, refuses},
		{&refusal{status: 301, retryAfter: time.Hour}, time.Minute, time.Minute, refuses},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{}
			q, log := r.queue(t)
			r.fail = func(try int, _ []int) error {
				if try == 1 {
					return test.err
				}
				return nil
			}
			q.put(points(0, 1))
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			time.Sleep(2 * time.Hour)
			q.close()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if len(r.at) != 2 || r.at[1] < test.least || r.at[1] > test.most {
				t.Errorf("%v: tries at %v", test.err, r.at)
			}
			if got := log.Take(); !strings.Contains(got, `level=ERROR msg="`+test.message+`" `) {
				t.Errorf("%v: logged %s", test.err, got)
			}
		})
	}
}

// Each error is logged once in an outage, even if it comes and goes.
func TestDeliveryIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue(t)
		r.fail = func(try int, _ []int) error {
			switch {
			case try == 4: // the first of two
				return nil
			case try < 10:
				return fmt.Errorf("trouble %d", try%2)
			case try < 30:
				return fmt.Errorf("request %d failed", try)
			}
			return nil
		}
		q.put(points(0, 1))
		q.put(points(1, 1))
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		time.Sleep(2 * time.Hour)
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		lines := log.Take()
		if strings.Count(lines, "\n") != maxNews+1 ||
			strings.Count(lines, "reachable again") != 1 {
			t.Errorf("logged\n%s", lines)
		}
	})
}

// logOf returns what is logged of a day in which a metric is put each minute, while a request fails
// if fail says so of its time.
func logOf(t *testing.T, fail func(since time.Duration) error) string {
	var text string
	synctest.Test(t, func(t *testing.T) {
		r, start := &receiver{}, time.Now()
		to := r.destination()
		to.remote = true
		q, log := newRig(t, to, 1<<20, "")
		r.fail = func(int, []int) error { return fail(time.Since(start)) }
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 24 * 60 {
			q.put(points(i, 1))
			time.Sleep(time.Minute)
		}
		q.close()
		<-done
		text = log.Take()
	})
	return text
}

// The first delivery after the start is logged once. After an outage at the start its end is.
func TestDeliveryLogsItsStart(t *testing.T) {
	got := logOf(t, func(time.Duration) error { return nil })
	if got != "level=INFO msg=\"first delivery accepted\" metrics=1\n" {
		t.Errorf("logged\n%s", got)
	}
	got = logOf(t, func(since time.Duration) error {
		if since < 10*time.Minute {
			return errors.New("connection refused")
		}
		return nil
	})
	if strings.Count(got, "\n") != 2 || !strings.Contains(got, `msg="Backstop reachable again`) {
		t.Errorf("logged\n%s", got)
	}
}

// An outage is logged again each hour with what waits, also if each of its errors is another one.
func TestDeliveryRepeatsAnOutage(t *testing.T) {
	for _, test := range []struct {
		why  string
		fail func(since time.Duration) error
		most int
	}{
		{"one error", func(time.Duration) error { return errors.New("connection refused") }, 24},
		{"many errors", func(since time.Duration) error { return fmt.Errorf("request %s", since) },
			24 * maxNews},
	} {
		got := logOf(t, test.fail)
		last := regexp.MustCompile(`msg="Backstop unreachable, keeping metrics" ` +
			`since=2026-11-23T04:54:40Z metrics=1[34]\d\d bytes=\d{6} retry=\S+ error=.*\n` +
			`level=ERROR msg="ended before everything was delivered".*\n$`)
		if n := strings.Count(got, "unreachable"); n < 23 || n > test.most || !last.MatchString(got) {
			t.Errorf("%s: %d lines, logged\n%s", test.why, n, got)
		}
	}
}

// Trouble that comes and goes all the time has a bounded log, whose last line is true.
func TestDeliveryIsQuietAboutFlapping(t *testing.T) {
	got := logOf(t, func(since time.Duration) error {
		if since%time.Minute == 0 && since < 12*time.Hour {
			return errors.New("connection refused")
		}
		return nil
	})
	n := strings.Count(got, "\n")
	last := got[strings.LastIndex(strings.TrimSpace(got), "\n")+1:]
	if n < 12*maxNews || n > 13*maxNews+1 || !strings.Contains(last, "reachable again") {
		t.Errorf("%d lines, logged\n%s", n, got)
	}
	// After an hour without trouble an outage is logged at once, and so is its end.
	got = logOf(t, func(since time.Duration) error {
		since -= 20 * time.Hour
		if since >= 0 && since < 3*time.Minute || since%time.Minute == 0 && since < -2*time.Hour {
			return errors.New("connection refused")
		}
		return nil
	})
	tail := got[max(0, strings.LastIndex(got, `msg="Backstop unreachable`)):]
	want := regexp.MustCompile(`" metrics=[3-6] lasted=`)
	if strings.Count(tail, "\n") != 2 || !want.MatchString(tail) {
		t.Errorf("logged\n%s", got)
	}
}

// A receiver that is too slow for a large request gets smaller ones.
func TestDeliveryToASlowReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, _ := r.queue(t)
		q.to.post = func(ctx context.Context, body []byte) error {
			time.Sleep(min(time.Duration(len(body))*time.Second/6000, postTimeout))
			if len(body) > 6000*30 {
				return noAnswer(postTimeout)
			}
			return r.post(ctx, body)
		}
		q.put(points(0, 12_000)) // 840 KB
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		time.Sleep(10 * time.Minute)
		if got := r.arrived(); len(got) != 12_000 {
			t.Errorf("%d arrived", len(got))
		}
		q.close()
		<-done
	})
}

// Finding a limit for the size of requests costs few requests, and the next batches respect it.
func TestDeliveryFindsAnyLimit(t *testing.T) {
	for _, limit := range []int{1, 2, 39, 77, 1500, 4999} {
		r := &receiver{fail: func(_ int, values []int) error {
			if len(values) > limit {
				return &refusal{status: 413}
			}
			return nil
		}}
		q, log := r.queue(t)
		q.put(points(0, 5000))
		q.put(points(5000, 5000))
		q.put(points(10_000, 600))
		deliverAll(t, q)
		r.inOrder(t, 0, 10_600)
		if most := 15 + 3*10_600/limit; r.tries > most {
			t.Errorf("a limit of %d: %d requests, want up to %d", limit, r.tries, most)
		}
		logged(t, log, 0)
	}
}

// After a short-lived limit, requests grow again.
func TestDeliveryForgetsALimit(t *testing.T) {
	r := &receiver{fail: func(try int, values []int) error {
		if try <= 8 {
			return &refusal{status: 413}
		}
		return nil
	}}
	q, _ := r.queue(t)
	const batches, size = 30, 300
	for i := range batches {
		q.put(points(i*size, size))
	}
	deliverAll(t, q)
	r.inOrder(t, 0, batches*size)
	if last := r.sizes[len(r.sizes)-1]; last != size || r.tries > 150 {
		t.Errorf("the last of %d requests was of %d", r.tries, last)
	}
}

// Bad metrics are found at any position and set aside. No other metric is dropped with them.
func TestDeliveryFindsBadMetrics(t *testing.T) {
	for _, test := range []struct {
		bad  []int
		most int // requests
	}{
		{[]int{0}, 40}, {[]int{4999}, 40}, {[]int{1234, 1235}, 50},
		{[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 100}, {[]int{5, 1000, 2000, 3000, 4000}, 150},
	} {
		r := &receiver{fail: refusing(400, func(v int) bool { return slices.Contains(test.bad, v) })}
		dir := newDir(t)
		q, log := r.spooled(t, dir)
		q.put(points(0, 5000))
		q.close()
		n := len(test.bad)
		err := q.deliver(t.Context())
		if want := fmt.Sprintf("%d metrics not delivered", n); err == nil || err.Error() != want {
			t.Errorf("%v: error %v", test.bad, err)
		}
		var want []int
		for v := range 5000 {
			if !slices.Contains(test.bad, v) {
				want = append(want, v)
			}
		}
		if got := r.arrived(); !slices.Equal(got, want) {
			t.Errorf("%v: %d arrived", test.bad, len(got))
		}
		if r.tries > test.most {
			t.Errorf("%v: %d requests", test.bad, r.tries)
		}
		sent, dropped := fmt.Sprintf("sent %d, ", 5000-n), fmt.Sprintf(" dropped %d", n)
		got := figuresOf(q)
		if !strings.HasPrefix(got, sent) || !strings.HasSuffix(got, dropped) {
			t.Errorf("%v: its own figures are %s", test.bad, got)
		}
		left := files(t, dir)
		if len(left) != 1 || !strings.HasSuffix(left[0], fmt.Sprintf("-%d.json.gz.bad", n)) {
			t.Fatalf("%v: left %q", test.bad, left)
		}
		var kept []metric
		for _, v := range test.bad {
			kept = append(kept, points(v, 1)...)
		}
		packed := harness.ReadFile(t, filepath.Join(dir, left[0]))
		if body, err := bodyIn([]byte(packed)); err != nil || string(body) != string(encode(kept)) {
			t.Errorf("%v: set aside are %.200s, %v", test.bad, body, err)
		}
		logged(t, log, 1,
			fmt.Sprintf(`level=ERROR msg="metrics refused, dropping them" metrics=%d `, n),
			`example="[{\"metric\":\"web.a\",\"value\":`,
			`error="answer 400 Bad Request: missing fields"`,
			" file="+left[0])
	}
}

// Any number of bad metrics is found at any position, even if nothing was accepted before. A batch
// of nothing but bad ones does not hold up the others.
func TestDeliveryFindsManyBadMetrics(t *testing.T) {
	for name, bad := range map[string]func(value int) bool{
		"every 40th":      func(v int) bool { return v%40 == 0 },
		"every 100th":     func(v int) bool { return v%100 == 99 },
		"the first 1,000": func(v int) bool { return v < 1000 },
		"every other":     func(v int) bool { return v < 600 && v%2 == 0 },
		"the first batch": func(v int) bool { return v < 5000 },
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{fail: refusing(400, bad)}
			q, _ := r.queue(t)
			q.put(points(0, 5000))
			q.put(points(5000, 5))
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			time.Sleep(time.Hour)
			q.close()
			count := 0
			for v := range 5005 {
				if bad(v) {
					count++
				}
			}
			err := <-done
			if want := fmt.Sprintf("%d metrics not delivered", count); err == nil || err.Error() != want {
				t.Errorf("%s: error %v", name, err)
			}
			if got := r.arrived(); len(got) != 5005-count || slices.ContainsFunc(got, bad) {
				t.Errorf("%s: %d arrived", name, len(got))
			}
			// Each costs the halves on the way to it, and the probes.
			if r.tries > 100+count*20 {
				t.Errorf("%s: %d requests", name, r.tries)
			}
		})
	}
}

// Metrics that were set aside make room for others, and the next run does not send them.
func TestDeliverySetsAsideWithinTheLimit(t *testing.T) {
	dir := newDir(t)
	r := &receiver{fail: refusing(400, func(v int) bool { return v == 1 })}
	q, _ := r.spooled(t, dir)
	q.put(points(0, 10))
	harness.Must(t, q.try(t))
	aside := files(t, dir)
	if len(aside) != 1 {
		t.Fatalf("files %q", aside)
	}
	q.spool.close()
	q, _ = r.spooled(t, dir)
	if n := q.waiting(); n > 0 || !slices.Equal(files(t, dir), aside) {
		t.Errorf("%d metrics wait in the next run, files %q", n, files(t, dir))
	}
	q.limit = 8 << 10
	q.put(points(10, 1))
	q.put(points(11, 1))
	if left := files(t, dir); len(left) != 2 || slices.Contains(left, aside[0]) {
		t.Errorf("left %q", left)
	}
}

// The search for many bad metrics does not hold up the others.
func TestDeliverySearchesBesideTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: refusing(400, func(v int) bool { return v < 8000 && v%2 == 0 })}
		q, _ := r.queue(t)
		q.to.post = func(ctx context.Context, body []byte) error {
			time.Sleep(10 * time.Millisecond)
			return r.post(ctx, body)
		}
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		q.put(points(0, 4000))
		q.put(points(4000, 4000))
		for i := range 100 {
			q.put(points(8000+i, 1))
			time.Sleep(time.Second)
			if _, got := r.sofar(); i > 1 && !slices.Contains(got, 8000+i) {
				t.Errorf("%d waits for those that are bad", i)
			}
		}
		time.Sleep(time.Hour)
		got := figuresOf(q)
		if !strings.HasPrefix(got, "sent 4100, ") || !strings.HasSuffix(got, " dropped 4000") {
			t.Errorf("its own figures are %s", got)
		}
		q.close()
		<-done
	})
}

// An answer of another kind stops the search, which goes on later.
func TestDeliveryStopsSearchingAtAnotherAnswer(t *testing.T) {
	for name, other := range map[string]error{
		"429":       &refusal{status: 429, retryAfter: 10 * time.Minute},
		"no answer": errors.New("no answer within 30s"),
	} {
		for at := range 12 {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{fail: func(try int, _ []int) error {
					switch {
					case try <= at:
						return &refusal{status: 400}
					case try == at+1:
						return other
					}
					return nil
				}}
				q, _ := r.queue(t)
				q.put(points(0, 4000))
				if err := q.try(t); err != other || r.tries != at+1 {
					t.Errorf("%s at %d: %d requests, %v", name, at, r.tries, err)
				}
				deliverAll(t, q)
				if got := r.arrived(); len(got) != 4000 {
					t.Errorf("%s at %d: %d arrived", name, at, len(got))
				}
			})
		}
	}
}

// If every metric is refused, no metric is to blame: all are kept, and requests are few.
func TestDeliveryKeepsWhatIsRefusedAltogether(t *testing.T) {
	for _, size := range []int{1, 5, 5000} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{}
			q, log := r.queue(t)
			begin := time.Now()
			r.fail = func(int, []int) error {
				if time.Since(begin) < 3*time.Minute-time.Second {
					return &refusal{status: 400}
				}
				return nil
			}
			q.put(points(0, size))
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			time.Sleep(time.Minute - time.Second)
			if tries, _ := r.sofar(); tries > 7*16 {
				t.Errorf("%d metrics: %d requests within a minute", size, tries)
			}
			time.Sleep(3 * time.Minute)
			q.close()
			if err := <-done; err != nil {
				t.Error(err)
			}
			r.inOrder(t, 0, size)
			if got := fmt.Sprint(r.sizes); got != fmt.Sprint([]int{size}) {
				t.Errorf("requests of %s", got)
			}
			if got := log.Take(); strings.Count(got, "refuses metrics, keeping them") != 1 ||
				strings.Count(got, "\n") != 2 {
				t.Errorf("logged %s", got)
			}
		})
	}
}

// A receiver that breaks down during the search, and recovers, costs no other metric.
func TestDeliveryKeepsWhatABreakdownRefuses(t *testing.T) {
	for breaks := 2; breaks < 20; breaks++ {
		for works := breaks + 2; works < 60; works += 3 {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{fail: func(try int, values []int) error {
					if try >= breaks && try < works || slices.Contains(values, 3) {
						return &refusal{status: 400}
					}
					return nil
				}}
				q, _ := r.queue(t)
				q.put(points(0, 20))
				done := make(chan error)
				go func() { done <- q.deliver(t.Context()) }()
				time.Sleep(3 * time.Hour)
				q.close()
				if err := <-done; err == nil || err.Error() != "1 metrics not delivered" {
					t.Errorf("from %d to %d: %v", breaks, works, err)
				}
				if got := r.arrived(); len(got) != 19 || slices.Contains(got, 3) {
					t.Errorf("from %d to %d: arrived %v", breaks, works, got)
				}
				if r.tries > works+60 {
					t.Errorf("from %d to %d: %d requests", breaks, works, r.tries)
				}
			})
		}
	}
}

// While everything is refused, even from the middle of a batch on, there are few requests a minute,
// and all arrives in the end.
func TestDeliveryDoesNotHammer(t *testing.T) {
	for _, status := range []int{400, 413} {
		for _, taken := range []int{0, 1, 2} {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{}
				q, _ := r.queue(t)
				begin := time.Now()
				r.fail = func(try int, values []int) error {
					if len(values) > 200 || try > 3+taken && time.Since(begin) < 10*time.Minute {
						return &refusal{status: status}
					}
					return nil
				}
				q.put(points(0, 1000))
				done := make(chan error)
				go func() { done <- q.deliver(t.Context()) }()
				time.Sleep(10*time.Minute - time.Second)
				if tries, _ := r.sofar(); tries > 10*32 {
					t.Errorf("%d, %d taken: %d requests in 10 minutes", status, taken, tries)
				}
				time.Sleep(time.Hour)
				q.close()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if got := r.arrived(); len(got) != 1000 {
					t.Errorf("%d, %d taken: %d arrived", status, taken, len(got))
				}
			})
		}
	}
}

// After everything was refused, the backlog goes out in order.
func TestDeliveryKeepsTheOrderAcrossRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		begin := time.Now()
		r.fail = func(int, []int) error {
			if time.Since(begin) < 20*time.Minute {
				return &refusal{status: 400}
			}
			return nil
		}
		q, _ := r.queue(t)
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 20 {
			q.put(points(i, 1))
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Hour)
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		// One was tried until everything was accepted.
		if !slices.IsSorted(r.got[1:]) || len(r.arrived()) != 20 {
			t.Errorf("arrived %v", r.got)
		}
	})
}

// A receiver that refuses old metrics gets all the others, and fresh ones at once.
func TestDeliveryOutlastsWhatIsTooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, _ := r.queue(t)
		down, oldest := false, 0
		set := func(isDown bool, since int) {
			r.mu.Lock()
			down, oldest = isDown, since
			r.mu.Unlock()
		}
		r.fail = func(_ int, values []int) error {
			if down {
				return errors.New("connection refused")
			}
			return refusing(400, func(v int) bool { return v < oldest })(0, values)
		}
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		put := func(i int) {
			q.put(points(i*40, 40))
			time.Sleep(time.Minute)
		}
		put(0) // of which one is known to be accepted
		set(true, 0)
		for i := 1; i <= 30; i++ {
			put(i)
		}
		set(false, 29*40)
		for i := 31; i <= 100; i++ {
			put(i)
			if _, got := r.sofar(); i > 33 && !slices.Contains(got, i*40) {
				t.Errorf("batch %d waits for those that are too old", i)
			}
		}
		q.close()
		if err := <-done; err == nil || err.Error() != "1120 metrics not delivered" {
			t.Error(err)
		}
		if got := r.arrived(); len(got) != 40+72*40 {
			t.Errorf("%d arrived", len(got))
		}
	})
}

// If a fixed share of the requests is refused, no metric is to blame.
func TestDeliveryBlamesNoMetricForAFlappingReceiver(t *testing.T) {
	for name, refused := range map[string]func(try int) bool{
		"every second": func(try int) bool { return try%2 == 0 },
		"every third":  func(try int) bool { return try%3 == 0 },
		"every fourth": func(try int) bool { return try%4 == 0 },
		"two of three": func(try int) bool { return try%3 != 0 },
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{fail: func(try int, _ []int) error {
				if refused(try) {
					return &refusal{status: 400}
				}
				return nil
			}}
			q, _ := r.queue(t)
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			const sweeps = 100
			for i := range sweeps {
				q.put(points(i*40, 40))
				time.Sleep(time.Minute)
			}
			time.Sleep(time.Hour)
			figures := figuresOf(q)
			if got := r.arrived(); len(got) != sweeps*40 || !strings.HasSuffix(figures, "dropped 0") {
				t.Errorf("%s: of %d metrics %d arrived, %s", name, sweeps*40, len(got), figures)
			}
			q.close()
			<-done
		})
	}
}

// What is left of a batch after a part of it was accepted is sent once more and no more, however
// often that fails, also where a file has the whole.
func TestDeliveryRemembersWhatIsLeft(t *testing.T) {
	for name, dir := range map[string]string{"memory": "", "spool": newDir(t)} {
		r, down := &receiver{}, false
		r.fail = func(_ int, values []int) error {
			if down || len(values) > 1 && values[0] >= 100 {
				return errors.New("connection refused")
			}
			return nil
		}
		q, _ := newRig(t, r.destination(), 1<<20, dir)
		q.most = 100
		q.put(points(0, 300))
		q.try(t) // 100 are accepted
		down = true
		q.try(t)
		q.try(t)
		if got := q.waiting(); got != 200 {
			t.Errorf("%s: %d wait", name, got)
		}
		r.fail = nil
		deliverAll(t, q)
		r.inOrder(t, 0, 300)
		if got := figuresOf(q); !strings.HasPrefix(got, "sent 300,") {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// The first retry comes soon also where the last batch always waits for its confirmation.
func TestRetriesBeginAnewAfterAConfirmation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const proof, poll = 5 * time.Second, 4 * time.Second
		var (
			mu    sync.Mutex
			tries []time.Time
			down  bool
		)
		to := destination{name: "Carbon", remote: true, post: func(context.Context, []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if down {
				tries = append(tries, time.Now())
				return errors.New("connection refused")
			}
			return nil
		}}
		to.proof, to.confirm = proof, func() error { return nil }
		q, _ := newRig(t, to, 1<<20, "")
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for range 3 {
			for i := range 100 {
				mu.Lock()
				if i == 0 {
					tries = nil
				}
				down = i < 10
				mu.Unlock()
				q.put(points(i, 1))
				time.Sleep(poll)
			}
			if len(tries) < 2 || tries[1].Sub(tries[0]) > 3*time.Second {
				t.Errorf("tried at %s", tries)
			}
		}
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A metric that makes the receiver fail, or a proxy before it, holds up its own batch only. That
// batch is tried again, but not all the time, and arrives when the receiver takes it.
func TestDeliveryOutlastsAPoisonedBatch(t *testing.T) {
	const sweeps, batches, size = 60, 4, 10
	first := func(sweep, batch int) bool { return sweep+batch == 0 }
	for _, test := range []struct {
		why      string
		err      error
		down     time.Duration // before that, nothing goes through
		poisoned func(sweep, batch int) bool
	}{
		{"500", &refusal{status: 500}, 0, first},
		{"reset", errors.New("connection reset by peer"), 0, first},
		{"in the backlog", &refusal{status: 500}, 30 * time.Minute, first},
		{"in each sweep", &refusal{status: 500}, 0, func(_, batch int) bool { return batch == 2 }},
		{"now and then", errors.New("connection reset by peer"), 30 * time.Minute,
			func(sweep, batch int) bool { return sweep%7 == 0 && batch%2 == 0 }},
	} {
		synctest.Test(t, func(t *testing.T) {
			r, start, poison := &receiver{}, time.Now(), true
			r.fail = func(_ int, values []int) error {
				at := values[0] / size
				if time.Since(start) < test.down || poison && test.poisoned(at/batches, at%batches) {
					return test.err
				}
				return nil
			}
			q, _ := r.queue(t)
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			var good []int
			for i := range sweeps * batches {
				q.put(points(i*size, size))
				if !test.poisoned(i/batches, i%batches) {
					for v := range size {
						good = append(good, i*size+v)
					}
				}
				if i%batches == batches-1 {
					time.Sleep(time.Minute)
				}
			}
			time.Sleep(2 * time.Minute)
			if got := r.arrived(); !slices.Equal(got, good) {
				t.Errorf("%s: %d of %d good metrics arrived", test.why, len(got), len(good))
			}
			tries, got := r.sofar()
			if failed := tries - len(got)/size; failed > 2*len(got)/size+10*sweeps {
				t.Errorf("%s: %d requests failed", test.why, failed)
			}
			r.mu.Lock()
			poison = false
			r.mu.Unlock()
			time.Sleep(2 * time.Minute)
			if got := r.arrived(); len(got) != sweeps*batches*size {
				t.Errorf("%s: %d arrived in the end", test.why, len(got))
			}
			q.close()
			if err := <-done; err != nil {
				t.Errorf("%s: %v", test.why, err)
			}
		})
	}
}
