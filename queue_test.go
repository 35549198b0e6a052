package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// points returns n metrics whose values tell them apart.
func points(from, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		metrics[i] = metric{"", "web.a", whole(uint64(from + i)), 1795409680 + int64(from+i)}
	}
	return metrics
}

// receiver takes metrics, and fails as it is told.
type receiver struct {
	fail func(attempt int, values []int) error

	mu    sync.Mutex
	tries int
	at    []time.Duration // of the tries
	start time.Time
	sizes []int // of the requests that were taken
	got   []int // the values
}

func (r *receiver) destination() destination { return destination{"Backstop", encode, r.post} }

// sofar returns the number of tries, and the values that arrived.
func (r *receiver) sofar() (tries int, got []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tries, slices.Clone(r.got)
}

func (r *receiver) post(_ context.Context, body []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.start.IsZero() {
		r.start = time.Now()
	}
	r.tries++
	r.at = append(r.at, time.Since(r.start))
	var items []struct{ Value int }
	if err := json.Unmarshal(body, &items); err != nil {
		return err
	}
	values := make([]int, len(items))
	for i, item := range items {
		values[i] = item.Value
	}
	if r.fail != nil {
		if err := r.fail(r.tries, values); err != nil {
			return err
		}
	}
	r.sizes = append(r.sizes, len(items))
	r.got = append(r.got, values...)
	return nil
}

// inOrder tells whether r got the points from to to-1, each once, oldest first.
func (r *receiver) inOrder(t *testing.T, from, to int) {
	t.Helper()
	if len(r.got) != to-from {
		t.Errorf("%d metrics arrived, want %d", len(r.got), to-from)
		return
	}
	for i, value := range r.got {
		if value != from+i {
			t.Errorf("metric %d arrived in the place of %d", value, from+i)
			return
		}
	}
}

// queue returns a queue for r that holds up to 1 MiB in memory, and its log.
func (r *receiver) queue() (*queue, *logged) {
	log := &logged{}
	return newQueue(r.destination(), 1<<20, log.logger()), log
}

// figuresOf returns q's own figures, such as "sent 1, retried 0, dropped 0".
func figuresOf(q *queue) string {
	own := asLines(q.own("h", time.Unix(1, 0)))
	m := regexp.MustCompile(`h\.metrics\.sent (\d+) 1\nh\.metrics\.retried (\d+) 1\nh\.metrics\.dropped (\d+) 1\n`).FindStringSubmatch(own)
	return fmt.Sprintf("sent %s, retried %s, dropped %s", m[1], m[2], m[3])
}

func TestQueueDeliversInBatches(t *testing.T) {
	r := &receiver{}
	q, log := r.queue()
	q.put(nil)
	q.put(points(0, 12_001))
	q.put(points(12_001, 3))
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
	r.inOrder(t, 0, 12_004)
	if got := fmt.Sprint(r.sizes); got != "[5000 5000 2001 3]" {
		t.Errorf("requests of %s", got)
	}
	if got := log.take(); got != "" {
		t.Errorf("logged %s", got)
	}
}

// Sampling goes on while nothing can be delivered, and nothing is lost nor out of order.
func TestQueueOutlastsAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue()
		begin := time.Now()
		r.fail = func(int, []int) error {
			if time.Since(begin) < 10*time.Minute {
				return errors.New("connection refused")
			}
			return nil
		}
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 20 {
			q.put(points(i*10, 10))
			time.Sleep(time.Minute)
		}
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.inOrder(t, 0, 200)
		if got, want := figuresOf(q), fmt.Sprintf("sent 200, retried %d, dropped 0", 10*(r.tries-20)); got != want {
			t.Errorf("its own figures are %s after %d tries, want %s", got, r.tries, want)
		}
		// Exponential with jitter, from 1 s to 1 min: not thousands of tries, and none that waits for long.
		if r.tries < 20+10 || r.tries > 20+40 {
			t.Errorf("%d tries", r.tries)
		}
		for i := 1; i < len(r.at); i++ {
			if pause := r.at[i] - r.at[i-1]; pause > 90*time.Second {
				t.Errorf("a pause of %s", pause)
			}
		}
		want := regexp.MustCompile(`^level=ERROR msg="Backstop unreachable, keeping metrics" since=2026-11-23T04:54:40Z error="connection refused"
level=INFO msg="Backstop reachable again, metrics that were kept are delivered" metrics=1[0-2]0 last=\S+
$`)
		if got := log.take(); !want.MatchString(got) {
			t.Errorf("logged\n%swant\n%s", got, want)
		}
	})
}

// A backlog does not hold up what is measured now, and goes out oldest first.
func TestQueueFreshGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, _ := r.queue()
		r.fail = func(try int, _ []int) error {
			if try > 1 {
				return nil
			}
			return errors.New("connection refused")
		}
		q.to.post = func(ctx context.Context, body []byte) error {
			time.Sleep(time.Second) // each request takes that long
			return r.post(ctx, body)
		}
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 5 {
			q.put(points(i, 1))
		}
		time.Sleep(5 * time.Second) // one of the backlog is under way
		_, under := r.sofar()
		q.put(points(100, 1))
		time.Sleep(2500 * time.Millisecond)
		if _, got := r.sofar(); !slices.Equal(got[len(under)+1:len(under)+2], []int{100}) {
			t.Errorf("arrived %v, want the 100 after %v and one more", got, under)
		}
		q.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := slices.DeleteFunc(slices.Clone(r.got), func(v int) bool { return v == 100 }); !slices.Equal(got, []int{0, 1, 2, 3, 4}) {
			t.Errorf("arrived %v", r.got)
		}
	})
}

// What has arrived of a batch before it is given up is not counted as given up, nor kept.
func TestQueueCountsWhatArrived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: func(try int, values []int) error {
			if len(values) > 1000 {
				return &refusal{status: 413}
			}
			if try > 4 {
				return errors.New("connection refused")
			}
			return nil
		}}
		q, log := r.queue()
		q.put(points(0, 4000)) // of which 500 arrive, and 500
		go q.deliver(t.Context())
		synctest.Wait()
		_, got := r.sofar()
		if len(got) == 0 || len(got) == 4000 || q.metrics != 4000-len(got) {
			t.Errorf("%d arrived, %d are left", len(got), q.metrics)
		}
		if figures, want := figuresOf(q), fmt.Sprintf("sent %d, ", len(got)); !strings.HasPrefix(figures, want) {
			t.Errorf("its own figures are %s, want %s", figures, want)
		}
		q.mu.Lock()
		q.limit = 0
		q.bound()
		q.tellRoom(time.Now())
		q.mu.Unlock()
		if lines, want := log.take(), fmt.Sprintf("the oldest are given up\" metrics=%d ", 4000-len(got)); !strings.Contains(lines, want) {
			t.Errorf("logged\n%swant %s", lines, want)
		}
		if figures, want := figuresOf(q), fmt.Sprintf(" dropped %d", 4000-len(got)); !strings.HasSuffix(figures, want) {
			t.Errorf("its own figures are %s, want %s", figures, want)
		}
		q.close()
		synctest.Wait()
	})
}

// What was given up is told with its times even if the outage is over before the next line about it was due.
func TestQueueTellsAllThatWasGivenUp(t *testing.T) {
	for _, ends := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			down := true
			r := &receiver{}
			r.fail = func(int, []int) error {
				if down {
					return errors.New("connection refused")
				}
				return nil
			}
			q, log := r.queue()
			q.limit = 3000
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			r.put(q, 0, 1)
			synctest.Wait()
			r.put(q, 1, 20) // one line is due, at the first that is given up
			log.take()
			r.put(q, 21, 5)
			lost := 2600 - q.metrics
			if !ends {
				r.mu.Lock()
				down = false
				r.mu.Unlock()
				time.Sleep(2 * time.Second)
			}
			q.close()
			<-done
			lines := log.take()
			m := regexp.MustCompile(`given_up\.metrics=(\d+) given_up\.from=(\S+) given_up\.until=(\S+)`).FindStringSubmatch(lines)
			if m == nil {
				t.Fatalf("logged\n%s", lines)
			}
			until := inUTC(points(1_000_000+lost-100, 1)[0].time)
			if ends && (m[1] != fmt.Sprint(lost-100) || m[3] != until) || !ends && (m[1] != fmt.Sprint(lost) || m[2] != inUTC(points(1_000_000, 1)[0].time) || m[3] != until) {
				t.Errorf("ends %v, %d lost until %s: logged\n%s", ends, lost, until, lines)
			}
		})
	}
}

// Nor is what was given up before an outage.
func TestQueueTellsWhatWasGivenUpBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue()
		q.limit = 3000
		r.put(q, 0, 1)
		q.next()
		r.put(q, 1, 20) // one line is due, at the first that is given up
		q.failed(errors.New("connection refused"))
		before := regexp.MustCompile(`the oldest are given up" metrics=(\d+) `).FindStringSubmatch(log.take())
		r.put(q, 21, 5)
		deliverAll(t, q)
		lines := log.take()
		after := regexp.MustCompile(`given_up\.metrics=(\d+) `).FindStringSubmatch(lines)
		if before == nil || after == nil {
			t.Fatalf("told %v, then\n%s", before, lines)
		}
		told, _ := strconv.Atoi(before[1])
		also, _ := strconv.Atoi(after[1])
		if got, want := told+also, 2600-len(r.got); got != want {
			t.Errorf("%d lost, %d told", want, got)
		}
	})
}

// How long it waits after an answer.
func TestQueuePace(t *testing.T) {
	for _, test := range []struct {
		err         error
		least, most time.Duration
		message     string
	}{
		{errors.New("connection refused"), 500 * time.Millisecond, 1500 * time.Millisecond, "Backstop unreachable, keeping metrics"},
		{&refusal{status: 500}, 500 * time.Millisecond, 1500 * time.Millisecond, "Backstop fails, keeping metrics"},
		{&refusal{status: 408}, 500 * time.Millisecond, 1500 * time.Millisecond, "Backstop fails, keeping metrics"},
		{&refusal{status: 503, retryAfter: 7 * time.Second}, 7 * time.Second, 8 * time.Second, "Backstop fails, keeping metrics"},
		{&refusal{status: 429, retryAfter: time.Hour}, time.Hour, time.Hour + time.Second, "Backstop fails, keeping metrics"},
		{&refusal{status: 401}, time.Minute, time.Minute, "Backstop refuses metrics, keeping them until that is mended"},
		{&refusal{status: 301, retryAfter: time.Hour}, time.Minute, time.Minute, "Backstop refuses metrics, keeping them until that is mended"},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := &receiver{}
			q, log := r.queue()
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
			if got := log.take(); !strings.Contains(got, `level=ERROR msg="`+test.message+`" `) {
				t.Errorf("%v: logged %s", test.err, got)
			}
		})
	}
}

// Each trouble is told once in an outage, however often it comes and goes.
func TestQueueIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue()
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
		lines := log.take()
		if strings.Count(lines, "\n") != maxTold+1 || strings.Count(lines, "trouble 0") != 1 || strings.Count(lines, "reachable again") != 1 {
			t.Errorf("logged\n%s", lines)
		}
	})
}

// put puts batches of about a kilobyte each, from that number on.
func (r *receiver) put(q *queue, from, batches int) {
	for i := range batches {
		q.put(points(1_000_000+(from+i)*100, 100))
	}
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue()
		r.put(q, 0, 2)
		fit := int(q.limit / q.fresh[1].size) // the first is not packed
		r.put(q, 2, 4*fit-1)
		lost := 4*fit + 1 - len(q.fresh)
		if q.bytes > q.limit || q.bytes < q.limit*8/10 {
			t.Errorf("%d bytes are held, want up to %d", q.bytes, q.limit)
		}
		// Never more than one line a minute, and nothing untold.
		if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `level=ERROR msg="no room for more metrics; the oldest are given up" metrics=100 from=`) ||
			!strings.Contains(got, ` limit=1MiB`) {
			t.Errorf("logged %s", got)
		}
		time.Sleep(time.Minute)
		held := len(q.fresh)
		r.put(q, 4*fit+1, 1)
		lost += held + 1 - len(q.fresh)
		want := fmt.Sprintf(`metrics=%d from=%s until=%s`, 100*(lost-1), inUTC(points(1_000_100, 1)[0].time), inUTC(points(1_000_000+100*(lost-1), 1)[0].time))
		if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, want) {
			t.Errorf("logged %swant %s", got, want)
		}
		// The batch that is under way is not given up: it may just arrive.
		if q.next() != q.fresh[0] {
			t.Fatal("not the oldest")
		}
		first := q.inFlight
		held = len(q.fresh)
		r.put(q, 4*fit+2, 1)
		if q.fresh[0] != first || len(q.fresh) > held {
			t.Error("the batch in flight was given up")
		}
		if got, want := figuresOf(q), fmt.Sprintf("dropped %d", 100*(4*fit+3-len(q.fresh))); !strings.HasSuffix(got, want) {
			t.Errorf("its own figures are %s, want %s", got, want)
		}
	})
}

// What waits is packed; only what is sent at once is not.
func TestQueueKeepsNothingUnpacked(t *testing.T) {
	r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
	q, _ := r.queue()
	q.put(points(0, 12_000))
	unpacked := func() (n int) {
		for b := range q.all() {
			n += len(b.body)
		}
		return n
	}
	if unpacked() == 0 {
		t.Error("what is sent at once has to be unpacked first")
	}
	for range 3 {
		q.failed(q.send(t.Context(), q.next()))
		q.put(points(0, 12_000))
	}
	if n := unpacked(); n > 0 {
		t.Errorf("%d bytes are held unpacked", n)
	}
}

// Once closed, there is one try, and the loss is told in figures.
func TestQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
		q, log := r.queue()
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		q.put(points(0, 10))
		time.Sleep(10 * time.Minute) // until it waits for its next try for a minute or so
		q.put(points(10, 5))
		closed := time.Now()
		tries, _ := r.sofar()
		q.close()
		if err := <-done; err == nil || err.Error() != "15 metrics not delivered" {
			t.Errorf("error %v", err)
		}
		if r.tries != tries+1 || time.Since(closed) != 0 {
			t.Errorf("%d more tries in %s", r.tries-tries, time.Since(closed))
		}
		if got := log.take(); !strings.Contains(got, `level=ERROR msg="ending without having delivered everything" lost=15 error="connection refused"`) {
			t.Errorf("logged\n%s", got)
		}
	})
}
