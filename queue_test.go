package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

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
				`since=2026-11-23T04:54:40Z metrics=10 bytes=\d+ retry=\S+ error="connection refused"\n` +
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
		q.tellLosses()
		log.Take()
		q.figures.news = news{} // an hour later
		held := len(q.line.batches)
		q.fill(4*fit+1, 1)
		more := held + 1 - len(q.line.batches)
		from := inUTC(points(1_000_000+100*lost, 1)[0].time)
		until := inUTC(points(1_000_000+100*(lost+more-1), 1)[0].time)
		logged(t, log, 1, fmt.Sprintf(`level=ERROR msg="no room for more metrics, `+
			`dropping the oldest" metrics=%d from=%s until=%s limit=1MiB`, 100*more, from, until))
		// The batch in flight is not dropped: it may just have been accepted.
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
	const gone = 100
	for name, refused := range map[string]int{"": 0, "refused": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &receiver{}
			r.fail = refusing(400, func(value int) bool { return value < refused })
			dir := newDir(t)
			q, log := r.spooled(t, dir)
			q.pauses = pauses{first: time.Millisecond, longest: time.Millisecond}
			q.put(points(0, 1)) // it is on the disk
			if refused > 0 {
				q.put(points(gone, 1)) // and this one too, until its body is dropped in trouble
				harness.Must(t, os.Remove(filepath.Join(dir, files(t, dir)[1])))
			}
			q.works.Lock() // as it is held while the disk works
			done := make(chan error, 1)
			go func() { done <- q.deliver(t.Context()) }()
			for i := range 20 {
				q.queue.put(points(1+i, 1))
			}
			await(t, "all but those arrive", func() bool {
				isGone := func(value int) bool { return value == gone }
				return len(slices.DeleteFunc(r.arrived(), isGone)) == 21-refused
			})
			q.close()
			if err := <-done; (err != nil) != (refused > 0) {
				t.Error(err)
			}
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
	q, _ := r.spooled(t, newDir(t))
	q.pauses = pauses{first: time.Millisecond, longest: time.Millisecond}
	q.put(points(0, 1))
	q.put(points(1, 1))
	q.try(t)
	q.kill() // now they are on the disk only
	down = false
	q, log := r.spooled(t, q.spool.dir) // the first is read ahead
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

// While nothing goes through, what has files takes next to no memory, however long the next pause
// and whichever batch is tried.
func TestQueueIsInFilesWhileNothingGoesThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{fail: func(try int, _ []int) error {
			if try%2 == 0 {
				return &refusal{status: 503, retryAfter: time.Hour}
			}
			return errors.New("connection refused")
		}}
		q, _ := r.spooled(t, newDir(t))
		q.limit = 256 << 20
		done := make(chan error)
		go func() { done <- q.deliver(t.Context()) }()
		for i := range 50 {
			q.put(points(i*1000, 1000))
			time.Sleep(time.Minute)
			held := 0
			q.mu.Lock()
			for _, b := range q.line.batches {
				held += len(b.body)
			}
			q.mu.Unlock()
			if one := len(encode(points(i*1000, 1000))); held > 2*one {
				t.Errorf("%d bytes are in memory after %d batches of %d", held, 1+i, one)
			}
		}
		q.close()
		if err := <-done; err == nil {
			t.Error("no error for what is kept")
		}
	})
}
