package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	carbonPort = "2003" // of the plaintext protocol
	// What goes over one connection. A relay takes this much at once without dropping lines.
	carbonLines = 1_000
	carbonBytes = 64 << 10
	// carbonConnect is how long connecting may take.
	carbonConnect = 10 * time.Second
	// carbonStall is how long Carbon may read nothing.
	carbonStall = time.Minute
	// carbonMost is how long Carbon may take for a batch: less than the watchdog waits.
	carbonMost = maxFlight - time.Minute
	// carbonProof is how long Carbon has to live after reading a batch. carbon-cache has written
	// the batch to the disk by then, or has left the time for that in its own queue.
	carbonProof = 5 * time.Second
)

// carbon is the client of one Carbon, or of a relay: it writes Carbon's plaintext protocol. Its
// methods are called by one goroutine.
//
// Carbon never answers, but it closes a connection when it has read everything and we have closed
// our side. That is no proof yet. A Carbon that is stopped closes its connections, too, and so does
// a proxy when Carbon behind it is killed. Therefore a second, silent connection is opened before:
// the witness. What was posted is delivered when the witness is still open some seconds after
// Carbon has read it.
type carbon struct {
	url     *url.URL
	prefix  string        // of each metric, with a dot at the end; or ""
	connect time.Duration // see the constants
	stall   time.Duration
	proof   time.Duration

	witness *net.TCPConn // while this silent connection is open, Carbon lives; nil for none
	posts   int          // since it was opened
}

// newCarbon prepares for writing to a URL such as carbon://carbon.server:2003/docker. Its error
// never shows the URL: a user who takes it for Backstop's may have put a password in it.
func newCarbon(text string) (*carbon, error) {
	const want = "write one such as carbon://carbon.server:2003/docker"
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("not a URL; " + want)
	}
	prefix := strings.Trim(u.Path, "/")
	port, err := strconv.Atoi(cmp.Or(u.Port(), carbonPort))
	switch {
	case u.User != nil:
		return nil, errors.New("there is a user or a password in the URL, " +
			"but Carbon's plaintext protocol has no authentication; " + want)
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("there is a ? or a # in the URL, " +
			"but nothing can follow the prefix; " + want)
	case u.Hostname() == "":
		return nil, errors.New("no host in the URL; " + want)
	case err != nil || port < 1 || port > 65535:
		return nil, errors.New("the port in the URL is not a number from 1 to 65535; " + want)
	case prefix != "" && (!isGraphitePath(prefix) || len(prefix) > maxPath):
		return nil, errors.New("the prefix in the URL is not safe as a name in Graphite: " +
			"use letters, digits, - and _, with single dots between nodes; " + want)
	}
	u.Host = net.JoinHostPort(u.Hostname(), strconv.Itoa(port))
	c := &carbon{url: u, connect: carbonConnect, stall: carbonStall, proof: carbonProof}
	if u.Path = ""; prefix != "" {
		u.Path, c.prefix = "/"+prefix, prefix+"."
	}
	return c, nil
}

func (c *carbon) destination() destination {
	return destination{name: "Carbon", address: c.url.String(), remote: true,
		post: c.post, proof: c.proof, confirm: c.confirm}
}

// post writes a body from encode. It returns nil when Carbon has read it; confirm reports
// later whether it is delivered.
func (c *carbon) post(ctx context.Context, body []byte) error {
	metrics, err := decode(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, carbonMost, errCarbonSlow)
	defer cancel()
	if c.witness == nil {
		if c.witness, err = c.dial(ctx, c.url.Host); err != nil {
			return err
		}
	}
	for _, lines := range c.portions(metrics) {
		// To the same address: a host's name may have several.
		if err := c.write(ctx, c.witness.RemoteAddr().String(), lines); err != nil {
			if c.posts == 0 {
				c.dismiss()
			}
			return err
		}
	}
	c.posts++
	return nil
}

// portions returns metrics as lines, divided into what one connection takes.
func (c *carbon) portions(metrics []metric) (portions [][]byte) {
	var lines, line []byte
	n := 0
	for _, m := range metrics {
		line = m.appendLine(append(line[:0], c.prefix...))
		if n == carbonLines || n > 0 && len(lines)+len(line) > carbonBytes {
			portions = append(portions, lines)
			lines, n = nil, 0
		}
		lines, n = append(lines, line...), n+1
	}
	return append(portions, lines)
}

// errNotCarbon is what is wrong when something is read.
var errNotCarbon = errors.New("it answers, which Carbon's plaintext protocol never does: " +
	"check host and port")

// errCarbonSlow is what is wrong when that takes too long.
var errCarbonSlow = fmt.Errorf("it did not read a batch within %s", carbonMost)

// errCarbonGone is what is wrong when the witness has ended.
var errCarbonGone = errors.New("it closed the silent connection that shows whether it " +
	"lives; what it read last may be lost and is sent again")

// confirm returns nil if everything that was posted since the last time is delivered. Else it has
// to be posted again.
func (c *carbon) confirm() error {
	_, err := readNow(c.witness)
	c.dismiss()
	if !errors.Is(err, os.ErrDeadlineExceeded) { // it has ended, or it is no Carbon
		return errCarbonGone
	}
	return nil
}

// dismiss closes the witness.
func (c *carbon) dismiss() {
	c.witness.Close()
	c.witness, c.posts = nil, 0
}

func (c *carbon) dial(ctx context.Context, address string) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: c.connect, KeepAliveConfig: net.KeepAliveConfig{
		// A host that loses its power says nothing. This is how we notice while a batch is held.
		Enable: true, Idle: time.Second, Interval: time.Second, Count: 3,
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, plainly(ctx, err)
	}
	return conn.(*net.TCPConn), nil
}

// write opens a connection for lines, and waits until Carbon has read all of them.
func (c *carbon) write(ctx context.Context, address string, lines []byte) error {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err = c.send(conn, lines); err == nil {
		err = c.awaitEnd(conn)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("it read nothing for %s", c.stall)
	}
	// The same trouble has the same text, whatever we were at when it came.
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) || // not on Windows
		errors.Is(err, syscall.ECONNRESET) {
		err = os.NewSyscallError("read", syscall.ECONNRESET)
	}
	if bare, ok := err.(*os.SyscallError); ok {
		err = &net.OpError{Op: "read", Net: "tcp", Addr: conn.RemoteAddr(), Err: bare}
	}
	return plainly(ctx, err)
}

// send sends lines, and the end of them.
func (c *carbon) send(conn *net.TCPConn, lines []byte) error {
	for piece := range slices.Chunk(lines, 4<<10) { // small, so that we see progress
		if err := conn.SetDeadline(time.Now().Add(c.stall)); err != nil {
			return err
		}
		if _, err := conn.Write(piece); err != nil {
			return err
		}
	}
	switch n, err := readNow(conn); {
	case n > 0:
		return errNotCarbon
	case errors.Is(err, io.EOF):
		return errors.New("it closed the connection before the end of the metrics: " +
			"check that the port is that of Carbon's plaintext protocol")
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	}
	return conn.CloseWrite()
}

// awaitEnd waits until the other side has read everything and closes conn.
func (c *carbon) awaitEnd(conn *net.TCPConn) error {
	for {
		before := unacknowledged(conn)
		if err := conn.SetDeadline(time.Now().Add(c.stall)); err != nil {
			return err
		}
		n, err := conn.Read(make([]byte, 1))
		left := unacknowledged(conn)
		switch {
		case n > 0:
			return errNotCarbon
		case errors.Is(err, os.ErrDeadlineExceeded) && left < before:
			continue // a slow network
		case !errors.Is(err, io.EOF):
			return err
		case left > 0:
			return errors.New("it closed the connection before it had read all metrics")
		}
		return socketError(conn)
	}
}
