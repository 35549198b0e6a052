package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func refusing(status int, bad func(value int) bool) func(int, []int) error {
	return func(_ int, values []int) error {
		if slices.ContainsFunc(values, bad) {
			return &refusal{status: status, line: "missing fields"}
		}
		return nil
	}
}

// What is refused for ever is found, and nothing else is given up with it.
func TestQueueFindsBadMetrics(t *testing.T) {
	for _, test := range []struct {
		bad  []int
		most int // requests
	}{
		{[]int{0}, 45}, {[]int{4999}, 45}, {[]int{1234, 1235}, 70}, {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 95}, {[]int{5, 1000, 2000, 3000, 4000}, 145},
	} {
		r := &receiver{fail: refusing(400, func(v int) bool { return slices.Contains(test.bad, v) })}
		q, log := r.queue()
		q.put(points(0, 5000))
		q.put(points(5000, 3))
		q.close()
		if err := q.deliver(t.Context()); err == nil || err.Error() != fmt.Sprintf("%d metrics not delivered", len(test.bad)) {
			t.Errorf("%v: error %v", test.bad, err)
		}
		slices.Sort(r.got)
		r.got = slices.Compact(r.got) // one part of them is asked for again
		var want []int
		for v := range 5003 {
			if !slices.Contains(test.bad, v) {
				want = append(want, v)
			}
		}
		if !slices.Equal(r.got, want) {
			t.Errorf("%v: %d arrived", test.bad, len(r.got))
		}
		if r.tries > test.most {
			t.Errorf("%v: %d requests", test.bad, r.tries)
		}
		if got, want := figuresOf(q), fmt.Sprintf("sent %d, ", 5003-len(test.bad)); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, fmt.Sprintf(" dropped %d", len(test.bad))) {
			t.Errorf("%v: its own figures are %s", test.bad, got)
		}
		if got := log.take(); !strings.HasPrefix(got, fmt.Sprintf(`level=ERROR msg="metrics refused; they are given up" metrics=%d such_as="[{\"metric\":\"web.a\",\"value\":`, len(test.bad))) ||
			!strings.Contains(got, `error="answer 400 Bad Request: missing fields"`) || strings.Count(got, "\n") != 1 {
			t.Errorf("%v: logged %s", test.bad, got)
		}
	}
}

// However many there are, and wherever, even if nothing else was taken before; a batch that has no other holds up none.
func TestQueueFindsManyBadMetrics(t *testing.T) {
	for name, bad := range map[string]func(value int) bool{
		"every 40th":      func(v int) bool { return v%40 == 0 },
		"every 100th":     func(v int) bool { return v%100 == 99 },
		"the first 1,000": func(v int) bool { return v < 1000 },
		"every other":     func(v int) bool { return v < 600 && v%2 == 0 },
		"the first batch": func(v int) bool { return v < 5000 },
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{fail: refusing(400, bad)}
			q, _ := r.queue()
			q.put(points(0, 5000))
			q.put(points(5000, 5))
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			time.Sleep(10 * time.Minute)
			q.close()
			count := 0
			for v := range 5005 {
				if bad(v) {
					count++
				}
			}
			if err := <-done; err == nil || err.Error() != fmt.Sprintf("%d metrics not delivered", count) {
				t.Errorf("%s: error %v", name, err)
			}
			slices.Sort(r.got)
			if got := slices.Compact(r.got); len(got) != 5005-count || slices.ContainsFunc(got, bad) {
				t.Errorf("%s: %d arrived", name, len(got))
			}
			// Each costs the way to it through the halves, and the other rounds.
			if r.tries > 50+count*18 {
				t.Errorf("%s: %d requests", name, r.tries)
			}
		})
	}
}

// Where every metric is refused, it is not the metrics: they are kept until that is mended.
func TestQueueKeepsWhatIsRefusedAltogether(t *testing.T) {
	for _, size := range []int{1, 5, 5000} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{}
			q, log := r.queue()
			begin := time.Now()
			r.fail = func(_ int, values []int) error {
				if time.Since(begin) < 3*time.Minute-time.Second {
					return &refusal{status: 400}
				}
				return nil
			}
			q.put(points(0, size))
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			time.Sleep(time.Minute - time.Second)
			if tries, _ := r.sofar(); tries > maxRow+min(size, maxSamples) {
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
			if got := log.take(); strings.Count(got, "refuses metrics, keeping them") != 1 || strings.Count(got, "\n") != 2 {
				t.Errorf("logged %s", got)
			}
		})
	}
}

// Something that breaks down, and is mended, in the midst of finding a bad metric costs no others.
func TestQueueKeepsWhatABreakdownRefuses(t *testing.T) {
	for breaks := 2; breaks < 16; breaks++ {
		for mended := breaks + 3; mended < 60; mended++ {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{fail: func(try int, values []int) error {
					if try >= breaks && try < mended || slices.Contains(values, 3) {
						return &refusal{status: 400}
					}
					return nil
				}}
				q, _ := r.queue()
				q.put(points(0, 20))
				done := make(chan error)
				go func() { done <- q.deliver(t.Context()) }()
				time.Sleep(time.Hour)
				q.close()
				if err := <-done; err == nil || err.Error() != "1 metrics not delivered" {
					t.Errorf("from %d to %d: %v", breaks, mended, err)
				}
				slices.Sort(r.got)
				if got := slices.Compact(r.got); len(got) != 19 || slices.Contains(got, 3) {
					t.Errorf("from %d to %d: arrived %v", breaks, mended, got)
				}
				if r.tries > mended+30 {
					t.Errorf("from %d to %d: %d requests", breaks, mended, r.tries)
				}
			})
		}
	}
}

// Once everything is refused, be it in the midst of a batch, there are few requests a minute, and all arrives in the end.
func TestQueueDoesNotHammer(t *testing.T) {
	for _, status := range []int{400, 413} {
		for _, taken := range []int{0, 1, 2} {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{}
				q, _ := r.queue()
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
				if tries, _ := r.sofar(); tries > 10*(10+maxRow+maxSamples) {
					t.Errorf("%d, %d taken: %d requests in 10 minutes", status, taken, tries)
				}
				time.Sleep(time.Hour)
				q.close()
				if err := <-done; err != nil {
					t.Error(err)
				}
				slices.Sort(r.got)
				if got := slices.Compact(r.got); len(got) != 1000 {
					t.Errorf("%d, %d taken: %d arrived", status, taken, len(got))
				}
			})
		}
	}
}

// A request that is too large is halved, and the next ones are not made so large.
func TestQueueLearnsHowMuchIsTaken(t *testing.T) {
	r := &receiver{fail: func(_ int, values []int) error {
		if len(values) > 1500 {
			return &refusal{status: 413}
		}
		return nil
	}}
	q, log := r.queue()
	q.put(points(0, 5000))
	q.put(points(5000, 5000))
	q.put(points(10_000, 600))
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	r.inOrder(t, 0, 10_600)
	if got := fmt.Sprint(r.sizes); got != "[1250 1250 1250 1250 1250 1250 1250 1250 600]" || r.tries != 9+2 {
		t.Errorf("requests of %s, %d in all", got, r.tries)
	}
	if got := log.take(); got != "" {
		t.Errorf("logged %s", got)
	}
}

// However small the requests have to be.
func TestQueueFindsAnyLimit(t *testing.T) {
	for _, limit := range []int{1, 2, 39, 77, 4999} {
		r := &receiver{fail: func(_ int, values []int) error {
			if len(values) > limit {
				return &refusal{status: 413}
			}
			return nil
		}}
		q, log := r.queue()
		q.put(points(0, 5000))
		q.close()
		if err := q.deliver(t.Context()); err != nil {
			t.Error(err)
		}
		r.inOrder(t, 0, 5000)
		if most := 13 + 2*5000/limit; r.tries > most+most/growAfter {
			t.Errorf("a limit of %d: %d requests", limit, r.tries)
		}
		if got := log.take(); got != "" {
			t.Errorf("logged %s", got)
		}
	}
}

// A limit that was there for a moment does not make requests small for ever.
func TestQueueForgetsALimit(t *testing.T) {
	r := &receiver{fail: func(try int, values []int) error {
		if try <= 12 {
			return &refusal{status: 413}
		}
		return nil
	}}
	q, _ := r.queue()
	const batches, size = 130, 300
	for i := range batches {
		q.put(points(i*size, size))
	}
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	values := slices.Sorted(slices.Values(r.got))
	if len(slices.Compact(values)) != batches*size {
		t.Errorf("%d arrived", len(values))
	}
	if last := r.sizes[len(r.sizes)-1]; last != size || r.tries > 9*growAfter+batches+12 {
		t.Errorf("the last of %d requests was of %d", r.tries, last)
	}
}

// A receiver that refuses some time's metrics takes all others, and those of the present at once.
func TestQueueOutlastsWhatIsTooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, _ := r.queue()
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
		put(0) // of which one is known to be taken
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
		slices.Sort(r.got)
		if got := slices.Compact(r.got); len(got) != 40+72*40 {
			t.Errorf("%d arrived", len(got))
		}
	})
}

// Where every other request is refused, or two of three, whatever is in it, no metric is to blame.
func TestQueueBlamesNoMetricForAFlappingReceiver(t *testing.T) {
	for _, every := range []int{2, 3} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{fail: func(try int, _ []int) error {
				if try%every != 0 {
					return &refusal{status: 400}
				}
				return nil
			}}
			q, _ := r.queue()
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			const sweeps = 100
			for i := range sweeps {
				q.put(points(i*40, 40))
				time.Sleep(time.Minute)
			}
			time.Sleep(5 * time.Minute)
			_, got := r.sofar()
			slices.Sort(got)
			if got = slices.Compact(got); len(got) < sweeps*40-20 || !strings.HasSuffix(figuresOf(q), "dropped 0") { // some may be on their way for long
				t.Errorf("one of %d is taken: of %d metrics %d arrived, %s", every, sweeps*40, len(got), figuresOf(q))
			}
			q.close()
			<-done
		})
	}
}

// To look for many bad metrics hammers nobody, and holds up nothing.
func TestQueueLooksForBadMetricsAtEase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: refusing(400, func(v int) bool { return v < 8000 && v%2 == 0 })}
		q, _ := r.queue()
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
			before, _ := r.sofar()
			time.Sleep(time.Minute)
			after, got := r.sofar()
			if !slices.Contains(got, 8000+i) {
				t.Errorf("%d waits for those that are bad", i)
			}
			// As many as are taken, too, and those that ask for how it is.
			if after-before > 60/refusedIn*maxRefused*3/2 {
				t.Errorf("%d requests in a minute", after-before)
			}
		}
		if got, want := figuresOf(q), "sent 4100, "; !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "dropped 4000") {
			t.Errorf("its own figures are %s", got)
		}
		q.close()
		<-done
	})
}

// Once an answer says something else, nothing more is asked.
func TestQueueStopsAskingAtAnotherAnswer(t *testing.T) {
	for name, other := range map[string]error{
		"429":       &refusal{status: 429, retryAfter: 10 * time.Minute},
		"no answer": errors.New("no answer within 30s"),
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{fail: func(try int, _ []int) error {
				switch {
				case try <= maxRow:
					return &refusal{status: 400}
				case try == maxRow+1:
					return other
				}
				return nil
			}}
			q, _ := r.queue()
			q.put(points(0, 4000))
			if err := q.send(t.Context(), q.next()); err != other || r.tries != maxRow+1 {
				t.Errorf("%s: %d requests, %v", name, r.tries, err)
			}
			deliverAll(t, q)
			slices.Sort(r.got)
			if got := slices.Compact(r.got); len(got) != 4000 {
				t.Errorf("%s: %d arrived", name, len(got))
			}
		})
	}
}

// After everything was refused, what is kept goes out in its order.
func TestQueueKeepsTheOrderAcrossRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		begin := time.Now()
		r.fail = func(int, []int) error {
			if time.Since(begin) < 20*time.Minute {
				return &refusal{status: 400}
			}
			return nil
		}
		q, _ := r.queue()
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
		// One of them is taken before all others: whichever was tried first.
		if got := slices.DeleteFunc(slices.Clone(r.got), func(v int) bool { return v == r.got[0] }); !slices.IsSorted(got) {
			t.Errorf("arrived %v", r.got)
		}
	})
}

// What rests at the end has its last try.
func TestQueueEndsWithBadMetrics(t *testing.T) {
	r := &receiver{fail: refusing(400, func(v int) bool { return v == 3 })}
	q, log := r.queue()
	q.put(points(0, 10))
	if err := q.send(t.Context(), q.next()); err != nil {
		t.Fatal(err)
	}
	if b, wait := q.turn(); b != nil || wait <= 0 {
		t.Errorf("%v does not rest", b)
	}
	q.close()
	if err := q.deliver(t.Context()); err == nil || err.Error() != "1 metrics not delivered" {
		t.Error(err)
	}
	if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "metrics refused; they are given up") {
		t.Errorf("logged\n%s", got)
	}
}
