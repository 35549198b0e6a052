package main

import (
	"cmp"
	"context"
	"crypto/tls"
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
	url    *url.URL    // without the prefix, which providers use as a password
	prefix string      // of each metric, with a dot at the end; or ""
	tls    *tls.Config // nil for none
	dialer net.Dialer
	// early is how long we wait with our end for that of what cannot read lines: the port of
	// pickle, and HAProxy's with TLS, close in order like Carbon, but do not wait for us. A proxy
	// may end the witness so much later than a connection.
	early time.Duration
	stall time.Duration // how long Carbon may read nothing
	proof time.Duration // see carbonProof

	witness *connection // while this silent connection is open, Carbon lives; nil for none
	posts   int         // since it was opened
}

// newCarbon prepares for writing to a URL such as carbon://carbon.server:2003/docker, or the same
// with TLS, carbons://. Its error never shows the URL: there may be a password in it.
func newCarbon(text string) (*carbon, error) {
	scheme, _, _ := strings.Cut(strings.ToLower(text), ":")
	want := "write one such as " + scheme + "://carbon.server:2003/docker"
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("not a URL; " + want)
	}
	prefix, isSecure := strings.Trim(u.Path, "/"), scheme == "carbons"
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "2003"), 10, 16)
	switch {
	case u.User != nil:
		return nil, errors.New("there is a user or a password in the URL, " +
			"but Carbon's plaintext protocol has no authentication; " + want)
	case strings.ContainsAny(text, "?#"):
		return nil, errors.New("there is a ? or a # in the URL, " +
			"but nothing can follow the prefix; " + want)
	case u.Hostname() == "":
		return nil, errors.New("no host in the URL; " + want)
	case isSecure && u.Port() == "":
		return nil, errors.New("no port in the URL, and there is no usual one for TLS; " + want)
	case err != nil || port == 0:
		return nil, errors.New("the port in the URL is not a number from 1 to 65535; " + want)
	case prefix != "" && (!isGraphitePath(prefix) || len(prefix) > maxPath):
		return nil, errors.New("the prefix in the URL is not safe as a name in Graphite: " +
			"use letters, digits, - and _, with single dots between nodes; " + want)
	}
	c := &carbon{
		url: &url.URL{Scheme: scheme, Host: net.JoinHostPort(u.Hostname(), fmt.Sprint(port))},
		dialer: net.Dialer{Timeout: 10 * time.Second, KeepAliveConfig: net.KeepAliveConfig{
			// A host that loses its power says nothing. So we notice it while a batch is held.
			Enable: true, Idle: time.Second, Interval: time.Second, Count: 3,
		}},
		early: 500 * time.Millisecond, stall: time.Minute, proof: carbonProof,
	}
	if isSecure {
		c.tls = &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12}
	}
	if prefix != "" {
		c.prefix = prefix + "."
	}
	return c, nil
}

func (c *carbon) destination() destination {
	return destination{name: "Carbon", address: c.url.String(), remote: true,
		post: c.post, proof: c.proof, confirm: c.confirm}
}

// post writes a body from encode. It returns nil when Carbon has read it; confirm reports
// later whether it is delivered.
func (c *carbon) post(ctx context.Context, body []byte) (err error) {
	portions, err := inLines(body, c.prefix)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, carbonMost, errCarbonSlow)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w%s", err, receiverHint(err, c.url.Scheme))
		}
	}()
	if c.witness == nil {
		if c.witness, err = c.dial(ctx, c.url.Host); err != nil {
			return err
		}
	}
	for i, lines := range portions {
		if err := c.write(ctx, lines, c.posts+i == 0); err != nil {
			if c.posts == 0 {
				c.dismiss()
			}
			return err
		}
	}
	c.posts++
	return nil
}

var (
	// errUnread is for both ending: most likely Carbon was stopped.
	errUnread     = errors.New("it closed the connection before it had read all metrics")
	errCarbonSlow = fmt.Errorf("it did not read a batch within %s", carbonMost)
	errCarbonGone = errors.New("it closed the silent connection that shows whether it " +
		"lives; what it read last may be lost and is sent again")
)

// confirm returns nil if everything that was posted since the last time is delivered. Else it has
// to be posted again.
func (c *carbon) confirm() error {
	defer c.dismiss()
	if !c.lives(0) {
		return errCarbonGone
	}
	return nil
}

// lives reports whether the witness has neither ended, after a while, nor said anything.
func (c *carbon) lives(after time.Duration) bool {
	time.Sleep(after)
	_, err := c.witness.readNow()
	return errors.Is(err, os.ErrDeadlineExceeded)
}

func (c *carbon) dismiss() {
	c.witness.Close()
	c.witness, c.posts = nil, 0
}

// link is a TCP connection that TLS may go over.
type link struct {
	*net.TCPConn
	now bool // whether Read returns os.ErrDeadlineExceeded if there is nothing yet
}

func (l *link) Read(p []byte) (int, error) {
	if l.now {
		return readNow(l.TCPConn, p)
	}
	return l.TCPConn.Read(p)
}

// SetWriteDeadline does nothing: tls.Conn would allow 5 s for its end, however slow the network is.
func (l *link) SetWriteDeadline(time.Time) error { return nil }

type connection struct {
	halfCloser // the link itself, or TLS over it
	link       *link
}

type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// readNow reads a byte if there is one. It returns os.ErrDeadlineExceeded if there is none yet;
// what TLS sends on its own account is none.
func (c *connection) readNow() (int, error) {
	c.link.now = true
	defer func() { c.link.now = false }()
	return c.Read(make([]byte, 1))
}

func (c *carbon) dial(ctx context.Context, address string) (*connection, error) {
	conn, err := c.dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, plainly(ctx, err)
	}
	l := &link{TCPConn: conn.(*net.TCPConn)}
	if c.tls == nil {
		return &connection{l, l}, nil
	}
	secure := tls.Client(l, c.tls)
	err = cmp.Or(l.SetDeadline(time.Now().Add(c.dialer.Timeout)), secure.HandshakeContext(ctx),
		l.SetDeadline(time.Time{}))
	if err != nil {
		l.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) ||
			errors.Is(err, syscall.ECONNRESET) {
			err = errNoTLS
		}
		return nil, plainly(ctx, err)
	}
	return &connection{secure, l}, nil
}

// write opens a connection for lines, and waits until Carbon has read all of them.
func (c *carbon) write(ctx context.Context, lines []byte, isFirst bool) error {
	// To the same address: a host's name may have several.
	conn, err := c.dial(ctx, c.witness.RemoteAddr().String())
	if err != nil {
		return err
	}
	defer conn.link.Close() // that of TLS could wait
	defer context.AfterFunc(ctx, func() { conn.link.Close() })()
	if err = c.send(conn, lines, isFirst); err == nil {
		err = c.awaitEnd(conn)
	}
	// The same trouble has the same text, whatever we were at when it came.
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) || // not on Windows
		errors.Is(err, syscall.ECONNRESET) {
		err = &net.OpError{Op: "read", Net: "tcp", Addr: conn.RemoteAddr(),
			Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it read nothing for %s", c.stall)
	case (err == errUnread || errors.Is(err, syscall.ECONNRESET)) && c.lives(c.early):
		return errEnds
	}
	return plainly(ctx, err)
}

// send sends lines, and the end of them.
func (c *carbon) send(conn *connection, lines []byte, isFirst bool) error {
	for piece := range slices.Chunk(lines, 4<<10) { // small, so that we see progress
		conn.SetDeadline(time.Now().Add(c.stall)) // fails as Write does
		if _, err := conn.Write(piece); err != nil {
			return err
		}
	}
	if isFirst && c.tls == nil { // since the witness was opened; others fail TLS's handshake
		time.Sleep(c.early)
	}
	switch n, err := conn.readNow(); {
	case n > 0:
		return errAnswers
	case errors.Is(err, io.EOF):
		return errUnread
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	}
	return conn.CloseWrite()
}

// awaitEnd waits until the other side has read everything and closes conn.
func (c *carbon) awaitEnd(conn *connection) error {
	for {
		before := unacknowledged(conn.link.TCPConn)
		conn.SetDeadline(time.Now().Add(c.stall)) // fails as Read does
		n, err := conn.Read(make([]byte, 1))
		left := unacknowledged(conn.link.TCPConn)
		switch {
		case n > 0:
			return errAnswers
		case errors.Is(err, os.ErrDeadlineExceeded) && left < before:
			continue // a slow network
		case !errors.Is(err, io.EOF):
			return err
		case left > 0:
			return errUnread
		}
		return socketError(conn.link.TCPConn)
	}
}

// socketError returns an error of conn that came after the last call.
func socketError(conn *net.TCPConn) (err error) {
	raw, _ := conn.SyscallConn() // fails for nil only
	code := 0
	closed := raw.Control(func(fd uintptr) { code, err = takeError(fd) })
	if code != 0 {
		err = os.NewSyscallError("read", syscall.Errno(code))
	}
	return cmp.Or(closed, err)
}
