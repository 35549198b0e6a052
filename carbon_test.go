package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

func TestCarbonURLs(t *testing.T) {
	for text, want := range map[string]struct{ shown, prefix string }{
		"carbon://carbon.server":        {"carbon://carbon.server:2003", ""},
		"CARBON://carbon.server:2103/":  {"carbon://carbon.server:2103", ""},
		"carbon://carbon.server/docker": {"carbon://carbon.server:2003", "docker."},
		"carbon://[::1]/web-1.docker/":  {"carbon://[::1]:2003", "web-1.docker."},
		"carbon://[fe80::1%25eth0]:1/a": {"carbon://[fe80::1%25eth0]:1", "a."},
		"carbon://127.0.0.1:65535/a_b":  {"carbon://127.0.0.1:65535", "a_b."},
	} {
		to, err := parseDestination(text)
		if err != nil || to.address != want.shown || to.name != "Carbon" || !to.remote {
			t.Errorf("%s: %+v %v", text, to, err)
		}
		if c := mustCarbon(t, text); c.prefix != want.prefix {
			t.Errorf("%s has the prefix %q", text, c.prefix)
		}
	}
	for text, want := range map[string]string{
		"carbon:host:2003":               "no host in the URL; write one such as carbon://carbon",
		"carbon://":                      "no host in the URL",
		"carbon://:2003/secret":          "no host in the URL",
		"carbon://host:0":                "the port in the URL is not a number from 1 to 65535",
		"carbon://host:65536/secret":     "the port in the URL is not a number from 1 to 65535",
		"carbon://host:secret":           "not a URL",
		"carbon://user:secret@host/x":    "there is a user or a password in the URL, but Carbon",
		"carbon://secret@host":           "there is a user or a password",
		"carbon://host/x?secret=1":       "there is a ? or a # in the URL, but",
		"carbon://host/x?":               "there is a ? or a # in the URL",
		"carbon://host/x#secret":         "there is a ? or a # in the URL",
		"carbon://host/publish/secret":   "the prefix in the URL is not safe as a name in Graphite: use",
		"carbon://host/secret%0Aforged":  "the prefix in the URL is not safe",
		"carbon://host/secret;tag=v":     "the prefix in the URL is not safe",
		"carbon://host/a..secret":        "the prefix in the URL is not safe",
		"carbon://host/.secret":          "the prefix in the URL is not safe",
		"carbon://host/sécret":           "the prefix in the URL is not safe",
		"carbon://host/sec*":             "the prefix in the URL is not safe",
		"carbon://host/sec%20ret":        "the prefix in the URL is not safe",
		"carbon://host/" + longPath(300): "the prefix in the URL is not safe",
	} {
		_, err := parseDestination(text)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "sec") {
			t.Errorf("%.50s: %v", text, err)
		}
	}
}

// longPath returns a path with so many nodes.
func longPath(nodes int) string { return strings.TrimSuffix(strings.Repeat("nodes.", nodes), ".") }

// Each connection has at most 1,000 lines and 64 KB, all of them whole, and one silent connection
// is there from before the first until the batch is settled.
func TestCarbonPost(t *testing.T) {
	for _, test := range []struct {
		prefix   string
		metrics  []metric
		portions int
	}{
		{"", points(0, 1), 1},
		{"docker.", points(0, 2500), 3},
		{"docker.", points(0, 1000), 1},
		{longPath(170) + ".", points(0, 1000), 17},
	} {
		f := newFakeCarbon(t)
		c := mustCarbon(t, "carbon://"+f.address()+"/"+strings.TrimSuffix(test.prefix, "."))
		harness.Must(t, c.post(t.Context(), encode(test.metrics)))
		var want []byte
		for _, m := range test.metrics {
			want = m.appendLine(append(want, test.prefix...))
		}
		got := f.got()
		if text := strings.Join(got, ""); text != string(want) {
			t.Errorf("%d bytes arrived, want %d: %.200s", len(text), len(want), text)
		}
		for _, portion := range got {
			if n := strings.Count(portion, "\n"); n > 1000 || len(portion) > 64<<10 ||
				!strings.HasSuffix(portion, "\n") {
				t.Errorf("%d lines and %d bytes over one connection", n, len(portion))
			}
		}
		await(t, "the ends", func() bool { open, _ := f.connections(); return open == 1 })
		if _, n := f.connections(); n != test.portions+1 || len(got) != test.portions {
			t.Errorf("%d connections for %d portions", n, len(got))
		}
		harness.Must(t, c.confirm())
		await(t, "no connection is kept", func() bool { open, _ := f.connections(); return open == 0 })
	}
}

// What is not read in an orderly way is an error, and the log has the same text each time.
func TestCarbonTroubles(t *testing.T) {
	frozen := func(*net.TCPConn) { <-t.Context().Done() }
	for _, test := range []struct {
		why, want string
		fault     func(*net.TCPConn)
	}{
		{"reset", "it closed the connection before the end of the metrics: check that the port is " +
			"that of Carbon's plaintext protocol; is this TLS? Then --backstop begins with carbons://",
			func(conn *net.TCPConn) {
				conn.Read(make([]byte, 1))
				conn.SetLinger(0)
			}},
		{"frozen", "it read nothing for 200ms", frozen},
		{"HTTP", "it answers, which Carbon's plaintext protocol never does: check host and port; " +
			"is this TLS? Then --backstop begins with carbons://",
			func(conn *net.TCPConn) {
				io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
				io.Copy(io.Discard, conn)
			}},
	} {
		f := newFakeCarbon(t)
		c := mustCarbon(t, "carbon://"+f.address())
		c.stall = 200 * time.Millisecond
		for range 2 {
			f.fails(1, test.fault)
			err := c.post(t.Context(), onePoint)
			got := strings.ReplaceAll(errorText(err), f.address(), "ADDRESS")
			if got != test.want {
				t.Errorf("%s: %s, want %s", test.why, got, test.want)
			}
		}
		if c.witness != nil {
			t.Errorf("%s: after it there is a witness", test.why)
		}
	}

	f := newFakeCarbon(t)
	c := mustCarbon(t, "carbon://"+f.address())
	f.fails(1, frozen)
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(100*time.Millisecond, func() { cancel(errors.New("time is up")) })
	if err := c.post(ctx, onePoint); errorText(err) != "time is up" {
		t.Errorf("at the end: %v", err)
	}
	f.die()
	if err := c.post(t.Context(), onePoint); err == nil ||
		!strings.HasSuffix(err.Error(), "refused; is it running, and is --backstop its address?") {
		t.Errorf("nobody there: %v", err)
	}
}

// pair returns both ends of a connection, ours first.
func pair(t *testing.T, c *carbon) (ours *connection, theirs *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	defer listener.Close()
	ours, err = c.dial(t.Context(), listener.Addr().String())
	harness.Must(t, err)
	conn, err := listener.Accept()
	harness.Must(t, err)
	t.Cleanup(func() { ours.Close(); conn.Close() })
	return ours, conn.(*net.TCPConn)
}

// A receiver may close its side in order before it has read all.
func TestCarbonEndsTooEarly(t *testing.T) {
	c := mustCarbon(t, "carbon://127.0.0.1")
	portions, _ := inLines(encode(points(0, carbonLines)), c.prefix)
	portion := portions[0]

	ours, theirs := pair(t, c)
	harness.Must(t, theirs.CloseWrite())
	await(t, "its end", func() bool {
		if _, err := ours.readNow(); err == io.EOF {
			return true
		}
		return false
	})
	if err := c.send(ours, portion, false); err == nil ||
		err.Error() != "it closed the connection before it had read all metrics" {
		t.Errorf("closed at once: %v", err)
	}

	ours, theirs = pair(t, c)
	harness.Must(t, c.send(ours, portion, false))
	_, err := io.Copy(io.Discard, theirs)
	harness.Must(t, err)
	theirs.Close()
	harness.Must(t, c.awaitEnd(ours))

	if runtime.GOOS == "linux" {
		ours, theirs = pair(t, c)
		harness.Must(t, theirs.SetReadBuffer(1)) // so that its system does not take all
		harness.Must(t, c.send(ours, portion, false))
		harness.Must(t, theirs.CloseWrite())
		if err := c.awaitEnd(ours); err == nil ||
			err.Error() != "it closed the connection before it had read all metrics" {
			t.Errorf("closed with bytes unread: %v", err)
		}
	}

	// Its end is followed by an RST.
	ours, theirs = pair(t, c)
	_, err = ours.Write(portion)
	harness.Must(t, err)
	harness.Must(t, theirs.CloseWrite())
	theirs.SetLinger(0)
	theirs.Close()
	if err := c.awaitEnd(ours); err == nil {
		t.Error("an RST after the end was taken for an end")
	}
}

// The limit is for the time without progress, not for all.
func TestCarbonIsSlow(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux knows how many bytes are not acknowledged")
	}
	c := mustCarbon(t, "carbon://127.0.0.1")
	c.stall = 300 * time.Millisecond
	ours, theirs := pair(t, c)
	harness.Must(t, theirs.SetReadBuffer(64<<10))
	done := make(chan error, 1)
	go func() {
		err := c.send(ours, make([]byte, 8<<20), false)
		if err == nil {
			err = c.awaitEnd(ours)
		}
		done <- err
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for err := error(nil); err == nil; <-tick.C {
		_, err = io.ReadFull(theirs, make([]byte, 64<<10))
	}
	theirs.Close()
	harness.Must(t, <-done)
}

// carbonRig returns a rig that delivers to f, and its log. What is read is proven after a while.
func carbonRig(
	t *testing.T, f *fakeCarbon, dir string, proof time.Duration,
) (*rig, *carbon, *harness.Log) {
	t.Helper()
	c := mustCarbon(t, "carbon://"+f.address())
	c.early, c.proof = 0, proof
	r, log := newRig(t, c.destination(), 8<<20, dir)
	r.pauses = pauses{first: 10 * time.Millisecond, longest: 20 * time.Millisecond}
	return r, c, log
}

// Pending batches are kept and hold nobody up; they leave queue and spool when they are proven.
func TestCarbonPending(t *testing.T) {
	for _, dir := range []string{"", t.TempDir()} {
		f := newFakeCarbon(t)
		r, _, _ := carbonRig(t, f, dir, time.Second)
		end := delivering(t, r)
		start := time.Now()
		for i := range 3 {
			r.put(points(i*10, 10))
			await(t, "it is read at once", func() bool { return len(f.got()) == i+1 })
		}
		if early := time.Since(start); early < time.Second {
			if n := r.waiting(); n != 30 {
				t.Errorf("%d metrics are kept while they are pending", n)
			}
			if figures := figuresOf(r); !strings.HasPrefix(figures, "sent 0") {
				t.Errorf("figures: %s", figures)
			}
			if dir != "" && len(files(t, dir)) != 3 {
				t.Errorf("in the spool while they are pending: %q", files(t, dir))
			}
		}
		await(t, "they are delivered", func() bool { return r.waiting() == 0 })
		if took := time.Since(start); took < time.Second {
			t.Errorf("delivered after %s", took)
		}
		await(t, "no connection is kept", func() bool { open, _ := f.connections(); return open == 0 })
		harness.Must(t, end())
		if dir != "" && len(files(t, dir)) != 0 {
			t.Errorf("left in the spool: %q", files(t, dir))
		}
		if n := len(f.got()); n != 3 {
			t.Errorf("sent in %d portions", n)
		}
	}
}

// What is pending when Carbon ends, in order or not, is sent again, and nothing else is.
func TestCarbonIsSentAgain(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"", t.TempDir()} {
		f := newFakeCarbon(t)
		r, _, log := carbonRig(t, f, dir, 0)
		end := delivering(t, r)
		r.put(points(0, 10))
		await(t, "the first is delivered", func() bool { return r.waiting() == 0 })
		r.to.proof = time.Second // delivery waits, and will see it with the next put
		r.put(points(10, 20))    // in one batch: what is put later waits until this one is confirmed
		await(t, "it is read", func() bool {
			return strings.Count(strings.Join(f.got(), ""), "\n") == 30
		})
		address := f.address()
		f.die()
		await(t, "trouble", func() bool { return strings.Contains(log.String(), "keeping metrics") })
		f.mu.Lock()
		f.portions = nil // that Carbon had not written anything
		f.mu.Unlock()
		f.listen(t, address)
		await(t, "they are delivered", func() bool { return r.waiting() == 0 })
		var want []byte
		for _, m := range points(10, 20) {
			want = m.appendLine(want)
		}
		if got := strings.Join(f.got(), ""); sortedLines(got) != sortedLines(string(want)) {
			t.Errorf("after its end it got\n%swant\n%s", got, want)
		}
		harness.Must(t, end())
		for text, times := range map[string]int{
			`level=ERROR msg="Carbon unreachable, keeping metrics" since=`:                   1,
			`level=INFO msg="Carbon reachable again, kept metrics are delivered" metrics=20`: 1,
		} {
			if n := strings.Count(log.String(), text); n < times || n > times+1 {
				t.Errorf("%d times %s in\n%s", n, text, log)
			}
		}
		if figures := figuresOf(r); !strings.HasPrefix(figures, "sent 30") {
			t.Errorf("figures: %s", figures)
		}
	}
}

// A proxy ends its connections in order, whatever happened behind it.
func TestCarbonBehindAProxy(t *testing.T) {
	f := newFakeCarbon(t)
	f.fails(0, func(conn *net.TCPConn) { <-t.Context().Done() })
	address := f.address()
	proxy := newFakeCarbon(t)
	proxy.fails(0, func(in *net.TCPConn) {
		to, err := net.Dial("tcp", address)
		if err != nil {
			return
		}
		defer to.Close()
		go func() {
			io.Copy(to, in)
			to.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(io.Discard, to) // until its end, or its RST
	})
	r, _, log := carbonRig(t, proxy, "", time.Second)
	end := delivering(t, r)
	r.put(points(0, 10))
	await(t, "the witness and the metrics", func() bool { _, n := f.connections(); return n == 2 })
	f.die()
	await(t, "trouble", func() bool { return strings.Contains(log.String(), "keeping metrics") })
	f.fails(0, nil)
	f.listen(t, address)
	await(t, "they are delivered", func() bool { return r.waiting() == 0 })
	harness.Must(t, end())
	if n := strings.Count(strings.Join(f.got(), ""), "\n"); n < 10 {
		t.Errorf("%d lines arrived", n)
	}
}

// A long backlog does not depend on one witness: receivers close what is silent for long.
func TestCarbonReplacesTheWitness(t *testing.T) {
	f := newFakeCarbon(t)
	c := mustCarbon(t, "carbon://"+f.address())
	for range 2 {
		harness.Must(t, c.post(t.Context(), onePoint))
		harness.Must(t, c.post(t.Context(), onePoint))
		harness.Must(t, c.confirm())
	}
	if _, n := f.connections(); n != 6 {
		t.Errorf("%d connections", n)
	}
	await(t, "all end", func() bool { open, _ := f.connections(); return open == 0 })
}

// At the end the proof is waited for, as long as there is time. What the spool has stays there.
func TestCarbonEnds(t *testing.T) {
	t.Parallel()
	const soon = 300 * time.Millisecond
	for _, test := range []struct {
		why     string
		spooled bool
		proof   time.Duration
		kept    int
		failed  bool
	}{
		{"in memory", false, soon, 0, false},
		{"in memory, no time", false, time.Hour, 0, true},
		{"in the spool", true, soon, 0, false},
		{"in the spool, no time", true, time.Hour, 1, true},
	} {
		f := newFakeCarbon(t)
		dir := ""
		if test.spooled {
			dir = t.TempDir()
		}
		r, _, log := carbonRig(t, f, dir, test.proof)
		r.put(points(0, 10))
		r.close()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := r.deliver(ctx)
		cancel()
		if (err != nil) != test.failed ||
			strings.Contains(log.String(), "level=ERROR") != test.failed {
			t.Errorf("%s: %v\n%s", test.why, err, log)
		}
		if test.spooled && len(files(t, dir)) != test.kept {
			t.Errorf("%s: in the spool is %q", test.why, files(t, dir))
		}
		if got := strings.Join(f.got(), ""); strings.Count(got, "\n") != 10 {
			t.Errorf("%s: it got %s", test.why, got)
		}
	}
}

// What an earlier run left pending is sent again.
func TestCarbonStartsWithWhatWasPending(t *testing.T) {
	f, dir := newFakeCarbon(t), t.TempDir()
	first, _, _ := carbonRig(t, f, dir, time.Hour)
	first.put(points(0, 10))
	first.close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := first.deliver(ctx); err == nil {
		t.Error("no error for what is pending")
	}
	second, _, _ := carbonRig(t, f, dir, 0)
	second.close()
	harness.Must(t, second.deliver(t.Context()))
	if got := f.got(); len(got) != 2 || got[0] != got[1] || len(files(t, dir)) != 0 {
		t.Errorf("it got %q; left %q", got, files(t, dir))
	}
}

// What is pending counts for the limit, as all else that waits.
func TestCarbonPendingIsBounded(t *testing.T) {
	f := newFakeCarbon(t)
	r, _, _ := carbonRig(t, f, "", 500*time.Millisecond)
	r.limit = 4 << 10
	end := delivering(t, r)
	for i := range 30 {
		r.put(points(i*20, 20))
		await(t, "it is read", func() bool { return len(f.got()) == i+1 })
		if _, bytes := r.held(); bytes > r.limit {
			t.Errorf("%d bytes are held", bytes)
		}
	}
	f.die()
	end()
	if n := r.waiting(); n == 0 {
		t.Error("nothing was pending")
	}
}

// BenchmarkDrainToCarbon is BenchmarkDrain to a fake Carbon, or to the one at $BENCH_CARBON, a URL
// as in --backstop. It does not wait for the proof of the last batches.
func BenchmarkDrainToCarbon(b *testing.B) {
	url := os.Getenv("BENCH_CARBON")
	if url == "" {
		f := newFakeCarbon(b)
		f.fails(0, func(conn *net.TCPConn) { io.Copy(io.Discard, conn) })
		url = "carbon://" + f.address()
	}
	drain(b, mustCarbon(b, url).destination())
}
