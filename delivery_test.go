package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// points returns n metrics whose values tell them apart.
func points(from, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		metrics[i] = metric{"", "web.a", whole(uint64(from + i)), 1795409680 + int64(from+i)}
	}
	return metrics
}

// receiver stands in for Backstop. It keeps the values it gets, and fails as a test wants.
type receiver struct {
	fail func(attempt int, values []int) error

	mu    sync.Mutex
	tries int
	at    []time.Duration // of the tries
	start time.Time
	sizes []int // of the requests that were taken
	got   []int // the values
	news  chan struct{}
}

func (r *receiver) destination() destination { return destination{name: "Backstop", post: r.post} }

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
	select {
	case r.news <- struct{}{}:
	default:
	}
	return nil
}

// sofar returns the number of tries and the values that arrived.
func (r *receiver) sofar() (tries int, got []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tries, slices.Clone(r.got)
}

// arrived returns the values that arrived, sorted, each once.
func (r *receiver) arrived() []int {
	_, got := r.sofar()
	slices.Sort(got)
	return slices.Compact(got)
}

// waitFor waits until that many values have arrived.
func (r *receiver) waitFor(t *testing.T, values int) {
	t.Helper()
	r.mu.Lock()
	if r.news == nil {
		r.news = make(chan struct{}, 1)
	}
	r.mu.Unlock()
	late := time.After(time.Minute)
	for {
		if _, got := r.sofar(); len(got) >= values {
			return
		}
		select {
		case <-r.news:
		case <-late:
			_, got := r.sofar()
			t.Fatalf("%d values arrived, want %d", len(got), values)
		}
	}
}

// unreachableWhile is the failure of a receiver that cannot be reached while down is true.
func unreachableWhile(down *bool) func(int, []int) error {
	return func(int, []int) error {
		if *down {
			return errors.New("connection refused")
		}
		return nil
	}
}

// inOrder checks that the values of [from, to) arrived, each once, oldest first.
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

// refusing returns a failure for requests with a bad value in them.
func refusing(status int, bad func(value int) bool) func(int, []int) error {
	return func(_ int, values []int) error {
		if slices.ContainsFunc(values, bad) {
			return &refusal{status: status, line: "missing fields"}
		}
		return nil
	}
}

// rig is a queue and what delivers from it.
type rig struct {
	*queue
	*delivery
}

// newRig returns a rig that holds up to limit bytes, in a spool in dir, or in memory if dir is "",
// and its log.
func newRig(t testing.TB, to destination, limit int64, dir string) (*rig, *harness.Log) {
	t.Helper()
	log := &harness.Log{}
	r := &rig{queue: newQueue(limit, log.Logger())}
	if dir != "" {
		harness.Must(t, r.useSpool(&spool{dir: dir, log: log.Logger()}))
		t.Cleanup(r.kill)
		r.settle()
	}
	r.delivery = newDelivery(to, r.queue, log.Logger())
	return r, log
}

// queue returns a rig for r that holds up to 1 MiB in memory, and its log.
func (r *receiver) queue(t testing.TB) (*rig, *harness.Log) {
	return newRig(t, r.destination(), 1<<20, "")
}

// spooled returns a rig for r with its spool in dir, and its log.
func (r *receiver) spooled(t testing.TB, dir string) (*rig, *harness.Log) {
	return newRig(t, r.destination(), 1<<20, dir)
}

// settle waits until the disk has nothing to do, or fails.
func (r *rig) settle() {
	for done := r.spool == nil; !done; runtime.Gosched() {
		r.mu.Lock()
		done = r.disk.rests && r.disk.busy.IsZero()
		r.mu.Unlock()
	}
}

// kill lets others have the spool, as it is.
func (r *rig) kill() {
	unlock := r.lock()
	r.disk.ends, r.disk.rests = true, true
	unlock()
	<-r.kept
}

// put queues metrics and waits until the spool, if any, has written them.
func (r *rig) put(metrics []metric) {
	r.queue.put(metrics)
	r.settle()
}

// fill puts batches of about a kilobyte each, numbered from that one on.
func (r *rig) fill(from, batches int) {
	for i := range batches {
		r.put(points(1_000_000+(from+i)*100, 100))
	}
}

// try sends one batch.
func (r *rig) try(t testing.TB) error {
	defer r.settle()
	_, err := r.round(t.Context())
	if err != nil {
		r.logTrouble(err)
	}
	return err
}

// deliverNext sends what can be sent now.
func (r *rig) deliverNext(t testing.TB) error {
	b, body := r.next(true)
	return r.send(t.Context(), b, body)
}

// waiting returns how many metrics wait.
func (r *rig) waiting() (metrics int) {
	metrics, _, _, _ = r.backlog()
	return metrics
}

// logged checks that there are that many new lines in the log, with these texts in this order.
func logged(t testing.TB, log *harness.Log, lines int, texts ...string) {
	t.Helper()
	got := log.Take()
	if n := strings.Count(got, "\n"); n != lines {
		t.Errorf("%d lines logged, want %d:\n%s", n, lines, got)
	}
	rest, found := got, true
	for _, text := range texts {
		if _, rest, found = strings.Cut(rest, text); !found {
			t.Errorf("logged\n%swant %q in this order", got, texts)
			return
		}
	}
}

// deliverAll closes q and delivers all that is in it.
func deliverAll(t *testing.T, q *rig) {
	t.Helper()
	q.close()
	if err := q.deliver(t.Context()); err != nil {
		t.Error(err)
	}
}

// deliverRest is deliverAll where some were dropped.
func deliverRest(t *testing.T, q *rig) {
	t.Helper()
	q.close()
	if err := q.deliver(t.Context()); err == nil {
		t.Error("no error for what was dropped")
	}
}

// figuresOf returns q's own figures, such as "sent 1, retried 0, dropped 0".
func figuresOf(q *rig) string {
	own := asLines(q.own("h", time.Unix(1, 0)))
	var figures []string
	for _, name := range []string{"sent", "retried", "dropped"} {
		m := regexp.MustCompile(`(?m)^h\.metrics\.` + name + ` (\d+) 1$`).FindStringSubmatch(own)
		figures = append(figures, name+" "+m[1])
	}
	return strings.Join(figures, ", ")
}

func TestQueueDeliversInBatches(t *testing.T) {
	r := &receiver{}
	q, log := r.queue(t)
	q.put(nil)
	q.put(points(0, 12_001))
	q.put(points(12_001, 3))
	deliverAll(t, q)
	r.inOrder(t, 0, 12_004)
	if got := fmt.Sprint(r.sizes); got != "[5000 5000 2001 3]" {
		t.Errorf("requests of %s", got)
	}
	logged(t, log, 0)
}

// While nothing can be delivered, sampling goes on. In the end all has arrived, in order.
func TestQueueOutlastsAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue(t)
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
		// The newest was tried while nothing went through; the rest is in order.
		at := r.got[0]
		r.got = slices.Concat(r.got[10:at+10], r.got[:10], r.got[at+10:])
		r.inOrder(t, 0, 200)
		want := fmt.Sprintf("sent 200, retried %d, dropped 0", 10*(r.tries-20))
		if got := figuresOf(q); got != want {
			t.Errorf("its own figures are %s after %d tries, want %s", got, r.tries, want)
		}
		// Exponential backoff with jitter, from 1 s to 1 min: few tries, but no long pause.
		if r.tries < 20+10 || r.tries > 20+40 {
			t.Errorf("%d tries", r.tries)
		}
		for i := 1; i < len(r.at); i++ {
			if pause := r.at[i] - r.at[i-1]; pause > 90*time.Second {
				t.Errorf("a pause of %s", pause)
			}
		}
		lines := regexp.MustCompile(
			`^level=ERROR msg="Backstop unreachable, keeping metrics" ` +
				`since=2026-11-23T04:54:40Z metrics=10 bytes=\d+ error="connection refused"\n` +
				`level=INFO msg="Backstop reachable again, kept metrics are delivered" ` +
				`metrics=1[0-2]0 lasted=\S+\n$`)
		if got := log.Take(); !lines.MatchString(got) {
			t.Errorf("logged\n%swant\n%s", got, lines)
		}
	})
}

// Fresh metrics do not wait for the backlog, which goes out oldest first.
func TestQueueFreshGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, _ := r.queue(t)
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
		backlog := slices.DeleteFunc(slices.Clone(r.got), func(v int) bool { return v == 100 })
		if want := []int{4, 0, 1, 2, 3}; !slices.Equal(backlog, want) {
			t.Errorf("arrived %v", r.got)
		}
	})
}

// Waiting batches are packed, but the one that is sent at once.
func TestQueueKeepsNothingUnpacked(t *testing.T) {
	r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
	q, _ := r.queue(t)
	q.put(points(0, 12_000))
	unpacked := func() (n int) {
		for _, b := range q.line.batches {
			if !isPacked(b.body) {
				n += len(b.body)
			}
		}
		return n
	}
	if unpacked() == 0 {
		t.Error("what is sent at once has to be unpacked first")
	}
	for range 3 {
		q.try(t)
		q.put(points(0, 12_000))
	}
	if n := unpacked(); n > 0 {
		t.Errorf("%d bytes are held unpacked", n)
	}
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		q, log := r.queue(t)
		q.fill(0, 2)
		fit := int(q.limit / q.line.batches[1].size()) // the first is not packed
		q.fill(2, 4*fit-1)
		lost := 4*fit + 1 - len(q.line.batches)
		if _, bytes := q.line.size(); bytes > q.limit || bytes < q.limit*8/10 {
			t.Errorf("%d bytes are held, want up to %d", bytes, q.limit)
		}
		log.Take()
		held := len(q.line.batches)
		q.fill(4*fit+1, 1)
		more := held + 1 - len(q.line.batches)
		from := inUTC(points(1_000_000+100*lost, 1)[0].time)
		until := inUTC(points(1_000_000+100*(lost+more-1), 1)[0].time)
		logged(t, log, 1, fmt.Sprintf(`level=ERROR msg="no room for more metrics, `+
			`dropping the oldest" metrics=%d from=%s until=%s limit=1MiB`, 100*more, from, until))
		// The batch in flight is not dropped: it may just arrive.
		first, _ := q.next(true)
		held = len(q.line.batches)
		q.fill(4*fit+2, 1)
		if !slices.Contains(q.line.batches, first) || len(q.line.batches) > held {
			t.Error("the batch in flight was dropped")
		}
		want := fmt.Sprintf(" dropped %d", 100*(4*fit+3-len(q.line.batches)))
		if got := figuresOf(q); !strings.HasSuffix(got, want) {
			t.Errorf("its own figures are %s, want %s", got, want)
		}
	})
}

// Of a dropped batch, what has arrived before is neither counted as dropped nor kept.
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
		q, log := r.queue(t)
		q.put(points(0, 4000)) // of which 500 arrive, and 500
		go q.deliver(t.Context())
		synctest.Wait()
		_, got := r.sofar()
		if len(got) == 0 || len(got) == 4000 || q.waiting() != 4000-len(got) {
			t.Errorf("%d arrived, %d are left", len(got), q.waiting())
		}
		want := fmt.Sprintf("sent %d, ", len(got))
		if figures := figuresOf(q); !strings.HasPrefix(figures, want) {
			t.Errorf("its own figures are %s, want %s", figures, want)
		}
		q.mu.Lock()
		q.limit = 0
		q.bound()
		q.mu.Unlock()
		want = fmt.Sprintf(`dropping the oldest" metrics=%d `, 4000-len(got))
		if lines := log.Take(); !strings.Contains(lines, want) {
			t.Errorf("logged\n%swant %s", lines, want)
		}
		want = fmt.Sprintf(" dropped %d", 4000-len(got))
		if figures := figuresOf(q); !strings.HasSuffix(figures, want) {
			t.Errorf("its own figures are %s, want %s", figures, want)
		}
		q.close()
		synctest.Wait()
	})
}

// All that is dropped as there is no room is logged with its times, at the latest when the outage
// or the daemon ends.
func TestQueueTellsAllThatWasDropped(t *testing.T) {
	for _, ends := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			down := true
			r := &receiver{}
			r.fail = unreachableWhile(&down)
			q, log := r.queue(t)
			q.limit = 3000
			done := make(chan error)
			go func() { done <- q.deliver(t.Context()) }()
			q.fill(0, 1)
			synctest.Wait()
			q.fill(1, 20) // the first loss is logged at once
			q.fill(21, 5)
			lost := 2600 - q.waiting()
			if !ends {
				r.mu.Lock()
				down = false
				r.mu.Unlock()
				time.Sleep(2 * time.Second)
			}
			q.close()
			<-done
			line := regexp.MustCompile(`dropping the oldest" metrics=(\d+) from=(\S+) until=(\S+)`)
			lines := line.FindAllStringSubmatch(log.Take(), -1)
			sum := 0
			for _, line := range lines {
				n, _ := strconv.Atoi(line[1])
				sum += n
			}
			if sum != lost {
				t.Errorf("ends %v, %d lost: logged %q", ends, lost, lines)
			}
		})
	}
}

// A closed queue makes one more try, then logs how many metrics are lost.
func TestQueueEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: func(int, []int) error { return errors.New("connection refused") }}
		q, log := r.queue(t)
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
		want := `level=ERROR msg="ended before everything was delivered" ` +
			`lost=15 kept=0 error="connection refused"`
		if got := log.Take(); !strings.Contains(got, want) {
			t.Errorf("logged\n%swant %s", got, want)
		}
	})
}

// A batch is on the disk before it is sent, as long as the disk works.
func TestStoreComesBeforeTheFirstTry(t *testing.T) {
	dir := newDir(t)
	r := &receiver{}
	stored := 0
	r.fail = func(int, []int) error {
		stored = len(files(t, dir))
		return nil
	}
	q, _ := r.spooled(t, dir)
	done := make(chan error, 1)
	go func() { done <- q.deliver(t.Context()) }()
	q.queue.put(points(0, 1))
	r.waitFor(t, 1)
	if stored != 1 {
		t.Errorf("%d files when it was sent", stored)
	}
	q.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A batch that is delivered while its file is being written leaves no file.
func TestStoreIsOvertaken(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	q, _ := (&receiver{}).spooled(t, dir)
	q.works.Lock() // as it is held while the disk works
	q.queue.put(points(0, 1))
	time.Sleep(storeWait) // nobody waits any longer
	harness.Must(t, q.deliverNext(t))
	q.works.Unlock()
	q.settle()
	if left := files(t, dir); len(left) != 0 || q.waiting() != 0 {
		t.Errorf("left %q, %d wait", left, q.waiting())
	}
}

// Polls, deliveries and the end of the daemon do not wait for a disk that hangs, nor where metrics
// are refused or a file cannot be read.
func TestStoreThatHangs(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]int{"": 0, "refused": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &receiver{}
			r.fail = refusing(400, func(value int) bool { return value < refused })
			dir := newDir(t)
			q, log := r.spooled(t, dir)
			q.pauses = newPauses(pace{time.Millisecond, time.Millisecond, time.Millisecond})
			q.put(points(0, 1)) // it is on the disk
			if refused > 0 {
				q.put(points(100, 1)) // and this one there only
				harness.Must(t, os.Remove(filepath.Join(dir, files(t, dir)[1])))
			}
			q.works.Lock() // as it is held while the disk works
			done := make(chan error, 1)
			go func() { done <- q.deliver(t.Context()) }()
			for i := range 20 {
				q.queue.put(points(1+i, 1))
			}
			r.waitFor(t, 21-refused)
			q.close()
			if err := <-done; (err != nil) != (refused > 0) {
				t.Error(err)
			}
			slices.Sort(r.got)
			r.got = slices.Compact(r.got)
			r.inOrder(t, refused, 21)
			q.works.Unlock()
			<-q.kept // nothing writes to the folder from here on
			if got := log.Take(); strings.Contains(got, "is gone") {
				t.Errorf("logged by one that was late:\n%s", got)
			}
		})
	}
}

// A file that takes long to read is read once, and holds up no fresh metrics.
func TestStoreIsSlow(t *testing.T) {
	t.Parallel()
	down := true
	r := &receiver{fail: unreachableWhile(&down)}
	q, log := r.spooled(t, newDir(t))
	q.pauses = newPauses(pace{time.Millisecond, time.Millisecond, time.Millisecond})
	q.put(points(0, 1))
	q.put(points(1, 1))
	q.try(t)
	q.kill() // now they are on the disk only
	down = false
	q, log = r.spooled(t, q.spool.dir) // the first is read ahead
	q.works.Lock()
	done := make(chan error, 1)
	go func() { done <- q.deliver(t.Context()) }()
	for i := range 2 {
		r.waitFor(t, 1+i)
		q.queue.put(points(2+i, 1))
		time.Sleep(storeWait + time.Second/2)
		if _, got := r.sofar(); len(got) != 2+i || got[1+i] != 2+i {
			t.Errorf("%d arrived", got)
		}
	}
	q.works.Unlock()
	r.waitFor(t, 4)
	q.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, got := r.sofar(); !slices.Equal(got, []int{0, 2, 3, 1}) {
		t.Errorf("%d arrived", got)
	}
	if got := log.Take(); strings.Contains(got, "level=ERROR") {
		t.Errorf("logged\n%s", got)
	}
}

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
			`since=2026-11-23T04:54:40Z metrics=1[34]\d\d bytes=\d{6} error=.*\n` +
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
		// The newest goes first.
		if got := r.got[1:]; r.got[0] != 19 || !slices.IsSorted(got) {
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

// sampled returns n metrics of the sweep with that number.
func sampled(sweep, n int) []metric {
	metrics := make([]metric, n)
	for i := range metrics {
		name, at := fmt.Sprintf("web.m%d", i), 1795409680+int64(sweep)*60
		metrics[i] = metric{"", name, whole(uint64(sweep)), at}
	}
	return metrics
}

// sometimes is a fault of some requests, counted from 1. well answers the others.
func sometimes(when func(request int) bool, fault, well http.HandlerFunc) http.HandlerFunc {
	var mu sync.Mutex
	n := 0
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		now := when(n)
		mu.Unlock()
		if now {
			fault(w, r)
		} else {
			well(w, r)
		}
	}
}

// resets is a fault: the connection is reset, before or after the body was read.
func resets(afterBody bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if afterBody {
			io.Copy(io.Discard, r.Body)
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		conn.(*net.TCPConn).SetLinger(0) // so that closing it is a reset
		conn.Close()
	}
}

// drips is a fault: an answer, one byte a second.
func drips(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	for _, c := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") {
		if _, err := conn.Write([]byte{c}); err != nil {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-r.Context().Done():
			return
		}
	}
}

// deliveringTo returns a rig with short pauses for the stand-in, with or without a spool, and its
// log.
func deliveringTo(t *testing.T, s *harness.StandIn, spooled bool) (*rig, *backstop, *harness.Log) {
	t.Helper()
	b := mustBackstop(t, s.URL+"/publish/docker")
	b.leadPause = time.Millisecond
	dir := ""
	if spooled {
		dir = newDir(t)
	}
	q, log := newRig(t, b.destination(), 8<<20, dir)
	q.pauses = newPauses(pace{10 * time.Millisecond, 50 * time.Millisecond, 50 * time.Millisecond})
	return q, b, log
}

func sortedLines(text string) string {
	return strings.Join(harness.AllOf(`(?m)^(.*\n)`, text), "")
}

// Whatever goes wrong with sockets or answers, everything that was sampled arrives.
func TestEverythingArrives(t *testing.T) {
	first := func(n int) func(int) bool { return func(request int) bool { return request <= n } }
	everyThird := func(request int) bool { return request%3 != 0 }
	const sweeps, size = 6, 50
	type fault struct {
		why  string
		when func(request int) bool
		do   http.HandlerFunc
		// The client ends a request, and may send the next before the server notices.
		overlaps bool
	}
	faults := []fault{
		{"none", first(0), nil, false},
		{"reset before the body was read", first(5), resets(false), true},
		{"reset after the body was read", first(5), resets(true), true},
		{"500 now and then", everyThird,
			harness.AnswerWith(500, "<h1>Errno::ECONNREFUSED</h1>"), false},
		{"503 with Retry-After", first(2), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
		}, false},
		{"429", everyThird, harness.AnswerWith(429, ""), false},
		{"408", everyThird, harness.AnswerWith(408, ""), false},
		{"401, then repaired", first(3), harness.AnswerWith(401, "Not authorized\n"), false},
		{"404, then repaired", first(3), harness.AnswerWith(404, "unknown prefix"), false},
		{"302, then repaired", first(3), harness.AnswerWith(302, ""), false},
		{"400 to everything, then repaired", first(200), harness.AnswerWith(400, "<html>"), false},
		{"hangs", first(2), harness.Hang, true},
		{"one byte a second", first(2), drips, true},
	}
	for _, where := range []string{"memory", "spool"} {
		for _, f := range faults {
			t.Run(f.why+", "+where, func(t *testing.T) {
				t.Parallel()
				s := harness.NewStandIn(t)
				s.Set("", sometimes(f.when, f.do, s.Answer))
				q, b, log := deliveringTo(t, s, where == "spool")
				b.timeout, s.Patient = 2*time.Second, f.overlaps
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- q.deliver(ctx) }()
				want := ""
				for i := range sweeps {
					q.put(sampled(i, size))
					want += asLines(sampled(i, size))
				}
				if err := s.Await(".", strings.Count(want, "\n"), time.Minute); err != nil {
					t.Fatalf("%v\n%s", err, log.Take())
				}
				q.close()
				if err := <-done; err != nil {
					t.Error(err)
				}
				cancel()
				if got := s.Lines(); got != sortedLines(want) {
					t.Errorf("what arrived is not what was sampled")
				}
				own := asLines(q.own("h", time.Unix(1, 0)))
				if !strings.Contains(own, ".spooled 0 ") || !strings.Contains(own, ".dropped 0 ") {
					t.Errorf("in the end\n%s", own)
				}
				if q.spool != nil {
					if left := files(t, q.spool.dir); len(left) != 0 {
						t.Errorf("left %q", left)
					}
				}
			})
		}
	}
}

// Backstop is down for a while.
func TestEverythingArrivesAfterRefusedConnections(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	address := listener.Addr().String()
	listener.Close()
	s := harness.UnstartedStandIn(t.Errorf)
	q, b, log := deliveringTo(t, harness.NewStandIn(t), true)
	b.url.Host = address
	done := make(chan error, 1)
	go func() { done <- q.deliver(t.Context()) }()
	want := ""
	for i := range 5 {
		q.put(sampled(i, 20))
		want += asLines(sampled(i, 20))
	}
	harness.AwaitText(t, log.String, "connection refused", 1)
	if listener, err = net.Listen("tcp", address); err != nil {
		t.Skipf("another process has taken the port: %v", err)
	}
	server := &http.Server{Handler: s}
	go server.Serve(listener)
	defer server.Close()
	harness.Must(t, s.Await(".", strings.Count(want, "\n"), time.Minute))
	q.close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s.Lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// One metric of 5,000 is bad: only that one is missing.
func TestEverythingArrivesButTheBad(t *testing.T) {
	for _, where := range []string{"memory", "spool"} {
		s := harness.NewStandIn(t)
		s.Bad = "web.m1234 1795409680"
		q, _, log := deliveringTo(t, s, where == "spool")
		q.put(sampled(0, maxBatch))
		q.put(sampled(1, 20))
		q.close()
		if err := q.deliver(t.Context()); err == nil || err.Error() != "1 metrics not delivered" {
			t.Errorf("%s: %v", where, err)
		}
		all := asLines(sampled(0, maxBatch)) + asLines(sampled(1, 20))
		want := strings.Replace(all, "web.m1234 0 1795409680\n", "", 1)
		if s.Lines() != sortedLines(want) {
			t.Errorf("%s: what arrived is not what was sampled", where)
		}
		bad := `metrics=1 example="[{\"metric\":\"web.m1234\",`
		if got := log.Take(); !strings.Contains(got, bad) {
			t.Errorf("%s: logged %s", where, got)
		}
	}
}

// A proxy before Backstop limits the bytes of a request.
func TestEverythingArrivesInSmallRequests(t *testing.T) {
	s := harness.NewStandIn(t)
	s.Set("", func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 64<<10 {
			w.WriteHeader(413) // and the body is left unread
			return
		}
		s.Answer(w, r)
	})
	q, _, _ := deliveringTo(t, s, true)
	want := ""
	for i := range 3 {
		q.put(sampled(i, maxBatch))
		want += asLines(sampled(i, maxBatch))
	}
	deliverAll(t, q)
	if s.Lines() != sortedLines(want) {
		t.Error("what arrived is not what was sampled")
	}
}

// One of several Backstops behind a load balancer is broken: everything arrives without a failed
// delivery, whichever request meets the broken one.
func TestDeliveryDoesNotKeepStepWithABrokenBackstop(t *testing.T) {
	for name, broken := range map[string]func(request int) bool{
		"every second": func(n int) bool { return n%2 == 0 },
		"every third":  func(n int) bool { return n%3 == 0 },
		"every fourth": func(n int) bool { return n%4 == 0 },
		"two of three": func(n int) bool { return n%3 != 0 },
	} {
		for phase := range 4 {
			s := harness.NewStandIn(t)
			now := func(n int) bool { return broken(n + phase) }
			s.Set("", sometimes(now, harness.AnswerWith(503, ""), s.Answer))
			q, b, log := deliveringTo(t, s, false)
			b.leadAfter = 0 // each batch comes after a pause
			const sweeps = 20
			want := ""
			for i := range sweeps {
				q.put(sampled(i, 10))
				if err := q.try(t); err != nil {
					t.Errorf("%s, phase %d, sweep %d: %v", name, phase, i, err)
				}
				want += asLines(sampled(i, 10))
			}
			if got := s.Lines(); got != sortedLines(want) ||
				strings.Contains(log.Take(), "level=ERROR") {
				t.Errorf("%s, phase %d: %d lines arrived", name, phase, strings.Count(got, "\n"))
			}
		}
	}
}

// ticking is an engine's clock. It moves on a minute at each stats answer, so that each answer has
// points of its own.
type ticking struct {
	mu     sync.Mutex
	ticks  int64
	served []string // a point of each answer, "name time"
	asked  chan struct{}
}

// stats serves recorded stats of a container with the time of the tick.
func (c *ticking) stats(r *harness.Replay, container, file string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c.mu.Lock()
		c.ticks++
		at := time.Unix(1795409680+c.ticks*60, 0).UTC()
		c.served = append(c.served, fmt.Sprintf("%s.pids.current %d", container, at.Unix()))
		c.mu.Unlock()
		read := []byte(`"read":"` + at.Format(time.RFC3339) + `"`)
		w.Write(regexp.MustCompile(`"read":"[^"]*"`).ReplaceAll(r.Read(file), read))
		select {
		case c.asked <- struct{}{}:
		default:
		}
	}
}

// A daemon killed at any moment loses at most the sweep in progress. A later run delivers all
// others.
func TestEverythingArrivesInSpiteOfKills(t *testing.T) {
	t.Parallel()
	binary, err := exec.LookPath(program) // see testscript.Main
	harness.Must(t, err)
	engine, clock := harness.NewReplay(t, "cgroup2"), &ticking{asked: make(chan struct{}, 1)}
	stats := clock.stats(engine, "fx-idle", "stats-one-shot-idle.json")
	engine.On("/containers/fx-idle/stats", stats)
	s := harness.NewStandIn(t)
	s.Patient = true // it is killed in the middle of requests, too
	dir := filepath.Join(t.TempDir(), "spool")
	var log bytes.Buffer
	start := func() *exec.Cmd {
		daemon := exec.Command(binary, "--backstop="+s.URL+"/publish/docker",
			"--docker="+engine.URL, "--poll=500ms", "--spool="+dir)
		daemon.Stderr = &log
		harness.Must(t, daemon.Start())
		return daemon
	}
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	sure, perhaps := map[string]bool{}, map[string]bool{}
	everyFourth := func(n int) bool { return n%4 == 0 }
	const lives = 20
	for range lives {
		faults := []http.HandlerFunc{nil, nil, harness.AnswerWith(503, ""), harness.Hang,
			resets(true), sometimes(everyFourth, resets(true), s.Answer)}
		s.Set("", faults[random.IntN(len(faults))])
		daemon := start()
		select {
		case <-clock.asked:
		case <-time.After(time.Minute):
			t.Fatalf("it does not poll:\n%s", &log)
		}
		time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond) // the random moment
		daemon.Process.Kill()
		daemon.Wait()
		clock.mu.Lock()
		for i, point := range clock.served {
			if i < len(clock.served)-1 {
				sure[point] = true
			} else {
				perhaps[point] = true
			}
		}
		clock.served = nil
		clock.mu.Unlock()
		select {
		case <-clock.asked:
		default:
		}
	}
	if len(sure) < lives/4 {
		t.Errorf("only %d sweeps", len(sure))
	}

	s.Set("", nil)
	daemon := start()
	next := fmt.Sprintf(`^fx-idle\.pids\.current %d$`, 1795409680+(clock.ticks+1)*60)
	if err := s.Await(next, 1, time.Minute); err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
	daemon.Process.Signal(syscall.SIGTERM)
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	for point := range sure {
		if _, ok := s.Points()[point]; !ok {
			t.Errorf("%s is lost (seed %d)\n%s", point, seed, &log)
		}
	}
	for _, point := range clock.served {
		sure[point] = true
	}
	for point := range s.Points() {
		if strings.HasPrefix(point, "fx-idle.pids.current ") && !sure[point] && !perhaps[point] {
			t.Errorf("%s was never sampled", point)
		}
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("left %q", left)
	}
	t.Logf("%d sweeps in %d lives, %d of them perhaps lost",
		len(sure)+len(perhaps), lives, len(perhaps))
}

// While each fsync takes a minute, the daemon polls and delivers, and it ends in time.
func TestPollsGoOnWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	daemon, log := startOnSlowDisk(t, newDir(t), "fsync")
	harness.Must(t, daemon.Process.Signal(syscall.SIGTERM)) // with -D, it is the daemon
	if !hasEnded(daemon, 15*time.Second) {
		t.Errorf("it does not end\n%s", log)
	}
}

// hasEnded reports whether a daemon ends in time. strace keeps it as a zombie for a while.
func hasEnded(daemon *exec.Cmd, within time.Duration) bool {
	path := fmt.Sprintf("/proc/%d/stat", daemon.Process.Pid)
	for late := time.Now().Add(within); time.Now().Before(late); time.Sleep(50 * time.Millisecond) {
		if stat, err := os.ReadFile(path); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return true
		}
	}
	return false
}

// Nor does the start wait for the disk.
func TestPollsBeginWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	dir := newDir(t)
	startOnSlowDisk(t, dir, "newfstatat,openat", "-P", dir) // not of other files
}

// startOnSlowDisk starts a daemon, and awaits some of its polls. Each of these system calls takes a
// minute.
func startOnSlowDisk(t *testing.T, dir, calls string, more ...string) (*exec.Cmd, fmt.Stringer) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		harness.Cannot(t, "strace makes the disk slow: %v", err)
	}
	binary, err := exec.LookPath(program)
	harness.Must(t, err)
	s, engine := harness.NewStandIn(t), harness.NewReplay(t, "cgroup2")
	daemon := exec.Command(strace, slices.Concat([]string{"-D", "-f", "-qq", "-o", os.DevNull,
		"-e", "inject=" + calls + ":delay_enter=60s"}, more,
		[]string{binary, "--backstop=" + s.URL + "/publish/docker", "--docker=" + engine.URL,
			"--poll=1s", "--host=h", "--spool=" + dir})...)
	log := &harness.Log{}
	daemon.Stderr = log
	harness.Must(t, daemon.Start())
	t.Cleanup(func() {
		daemon.Process.Kill()
		hasEnded(daemon, time.Minute) // before its folder is removed
	})
	if err := s.Await(`^h\.metrics\.sampled `, 10, 50*time.Second); err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	return daemon, log
}

// --spool-limit bounds the memory of the process, not only the metrics that it keeps.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	s := harness.NewStandIn(t)
	s.Set("", harness.AnswerWith(503, ""))
	// Not the one in PATH: with the race detector, a program needs many times as much.
	binary := filepath.Join(t.TempDir(), program)
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	const limit = 24 // MiB
	engine := harness.NewReplay(t, "cgroup2")
	engine.On("/containers/fx-idle/stats", func(w http.ResponseWriter, _ *http.Request) {
		w.Write(randomNetworks(2000)) // a batch is as large as its points are random
	})
	daemon := exec.Command(binary, "--backstop="+s.URL+"/publish/docker", "--poll=50ms",
		"--docker="+engine.URL, "--per=interface", fmt.Sprintf("--spool-limit=%dMiB", limit))
	errs, err := daemon.StderrPipe()
	harness.Must(t, err)
	harness.Must(t, daemon.Start())
	defer daemon.Wait()
	defer daemon.Process.Kill()
	for lines := bufio.NewScanner(errs); lines.Scan(); {
		if strings.Contains(lines.Text(), "no room for more metrics") {
			break // it is full
		}
	}
	status := harness.ReadFile(t, fmt.Sprintf("/proc/%d/status", daemon.Process.Pid))
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindStringSubmatch(status)
	kB, err := strconv.Atoi(m[1])
	harness.Must(t, err)
	t.Logf("%d MiB with a limit of %d MiB", kB>>10, limit)
	if kB>>10 > limit+30 {
		t.Errorf("the process takes %d MiB with a limit of %d MiB", kB>>10, limit)
	}
}

// randomNetworks returns an engine's answer for a container with so many interfaces.
func randomNetworks(interfaces int) []byte {
	answer := []byte(`{"read":"` + time.Now().UTC().Format(time.RFC3339Nano) + `","networks":{`)
	for i := range interfaces {
		if i > 0 {
			answer = append(answer, ',')
		}
		answer = fmt.Appendf(answer,
			`"eth%d":{"rx_bytes":%d,"rx_packets":%d,"tx_bytes":%d,"tx_packets":%d}`,
			i, rand.Int64N(1e15), rand.Int64N(1e15), rand.Int64N(1e15), rand.Int64N(1e15))
	}
	return append(answer, "}}"...)
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
