package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// selfSigned returns a certificate for names and addresses, its own authority, valid until then;
// and a file that has it and its key.
func selfSigned(t testing.TB, until time.Time, names ...string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	harness.Must(t, err)
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: until,
		IsCA: true, BasicConstraintsValid: true}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			cert.IPAddresses = append(cert.IPAddresses, ip)
		} else {
			cert.DNSNames = append(cert.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	harness.Must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	harness.Must(t, err)
	file := slices.Concat(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	pair, err := tls.X509KeyPair(file, file)
	harness.Must(t, err)
	return pair, file
}

var nextYear = time.Now().AddDate(1, 0, 0)

// overTLS lets f read what comes by TLS, and ends each connection with a notice, or without.
func (f *fakeCarbon) overTLS(config *tls.Config, notices bool) {
	f.fails(0, func(conn *net.TCPConn) {
		secure := tls.Server(conn, config)
		text, err := io.ReadAll(secure)
		if err == nil && len(text) > 0 {
			f.mu.Lock()
			f.portions = append(f.portions, string(text))
			f.mu.Unlock()
		}
		if notices {
			secure.CloseWrite()
		}
	})
}

// newSecureCarbon returns a fake Carbon behind TLS, and its client.
func newSecureCarbon(t *testing.T, config *tls.Config, notices bool) (*fakeCarbon, *carbon) {
	t.Helper()
	f := newFakeCarbon(t)
	var file []byte
	config = config.Clone()
	config.Certificates = make([]tls.Certificate, 1)
	config.Certificates[0], file = selfSigned(t, nextYear, "127.0.0.1")
	f.overTLS(config, notices)
	c := mustCarbon(t, "carbons://"+f.address()+"/docker")
	c.tls.RootCAs = x509.NewCertPool()
	c.tls.RootCAs.AppendCertsFromPEM(file)
	return f, c
}

// TLS carries the same lines, and the witness shows the same: what TLS sends on its own account,
// such as tickets, is not taken for an answer, and each kind of end is seen.
func TestCarbonWithTLS(t *testing.T) {
	for _, test := range []struct {
		version uint16
		notices bool
	}{{tls.VersionTLS12, true}, {tls.VersionTLS13, true}, {tls.VersionTLS13, false}} {
		f, c := newSecureCarbon(t, &tls.Config{MaxVersion: test.version}, test.notices)
		if c.destination().address != "carbons://"+f.address() {
			t.Errorf("it is shown as %s", c.destination().address)
		}
		metrics := points(0, 2500)
		harness.Must(t, c.post(t.Context(), encode(metrics)))
		harness.Must(t, c.confirm())
		var want []byte
		for _, m := range metrics {
			want = m.appendLine(append(want, "docker."...))
		}
		if got := f.got(); len(got) != 3 || strings.Join(got, "") != string(want) {
			t.Errorf("%+v: %d portions arrived, of %d bytes; want %d bytes", test, len(got),
				len(strings.Join(got, "")), len(want))
		}
		await(t, "no connection is kept", func() bool { open, _ := f.connections(); return open == 0 })

		for why, end := range map[string]func(conn *net.TCPConn){
			"killed":  func(conn *net.TCPConn) { conn.SetLinger(0); conn.Close() },
			"stopped": func(conn *net.TCPConn) { conn.CloseWrite() },
		} {
			harness.Must(t, c.post(t.Context(), onePoint))
			await(t, "the witness", func() bool { open, _ := f.connections(); return open == 1 })
			f.mu.Lock()
			witness := f.open[0]
			f.mu.Unlock()
			end(witness)
			await(t, "its end", func() bool { return !c.lives(0) })
			if err := c.confirm(); err != errCarbonGone {
				t.Errorf("%+v, %s: %v", test, why, err)
			}
		}
	}
	if c := mustCarbon(t, "carbons://h:1"); c.tls.InsecureSkipVerify || c.tls.RootCAs != nil ||
		c.tls.MinVersion != tls.VersionTLS12 {
		t.Errorf("it does not verify as it should: %+v", c.tls)
	}
}

// crypto/tls sets a deadline of its own for the end, and leaves one that is over. Neither holds.
func TestCarbonWithTLSMayEndSlowly(t *testing.T) {
	_, c := newSecureCarbon(t, &tls.Config{}, true)
	conn, err := c.dial(t.Context(), c.url.Host)
	harness.Must(t, err)
	defer conn.link.Close()
	harness.Must(t, conn.CloseWrite())
	_, err = conn.link.Write([]byte("x"))
	harness.Must(t, err)
}

// apiKey is a prefix as providers have it. It is in no error and no line of the log.
const apiKey = "KEY-9f8e7d6c5b4a"

// One clear line says what is wrong with TLS, or with a receiver that needs it, each time the same.
func TestCarbonWithTLSTroubles(t *testing.T) {
	answering := func(config *tls.Config) func(*testing.T, *fakeCarbon) {
		return func(_ *testing.T, f *fakeCarbon) { f.overTLS(config, true) }
	}
	with := func(until time.Time, name string) func(*testing.T, *fakeCarbon) {
		cert, _ := selfSigned(t, until, name)
		return answering(&tls.Config{Certificates: []tls.Certificate{cert}})
	}
	faulty := func(fault func(*net.TCPConn)) func(*testing.T, *fakeCarbon) {
		return func(_ *testing.T, f *fakeCarbon) { f.fails(0, fault) }
	}
	yesterday := time.Now().AddDate(0, 0, -1).UTC().Truncate(time.Second)
	const isThere = "it does not answer the TLS handshake; is there TLS at that address? " +
		"If not, --backstop begins with carbon://"
	const isTLS = "it closed the connection before the end of the metrics: check that the port " +
		"is that of Carbon's plaintext protocol; is this TLS? Then --backstop begins with carbons://"
	for _, test := range []struct {
		why, scheme string
		receiver    func(*testing.T, *fakeCarbon)
		want        string
	}{
		{"wrong name", "carbons", with(nextYear, "carbon.example"),
			"tls: failed to verify certificate: x509: cannot validate certificate for 127.0.0.1 " +
				"because it doesn't contain any IP SANs; the host in --backstop must be a name that " +
				"the certificate has"},
		{"unknown authority", "carbons", with(nextYear, "127.0.0.1"),
			"tls: failed to verify certificate: x509: certificate signed by unknown authority; " +
				"add the certificate of that authority to this system's, or name its file in " +
				"SSL_CERT_FILE"},
		{"expired", "carbons", with(yesterday, "127.0.0.1"),
			"tls: failed to verify certificate: x509: certificate has expired or is not yet valid: " +
				"is after " + yesterday.Format(time.RFC3339) +
				"; renew the certificate, or set this host's clock"},
		{"plain Carbon", "carbons",
			faulty(func(conn *net.TCPConn) { io.Copy(io.Discard, conn) }), isThere},
		{"closes", "carbons", faulty(func(*net.TCPConn) {}), isThere},
		{"HTTP", "carbons", faulty(badRequest),
			"tls: first record does not look like a TLS handshake; there is no TLS at that address: " +
				"should --backstop begin with carbon://?"},
		{"TLS, closes in order", "carbon",
			faulty(func(conn *net.TCPConn) { conn.Read(make([]byte, 64<<10)) }), isTLS},
		{"TLS, resets", "carbon", faulty(func(conn *net.TCPConn) {
			conn.Read(make([]byte, 5))
			conn.SetLinger(0)
		}), isTLS},
	} {
		f := newFakeCarbon(t)
		test.receiver(t, f)
		c := mustCarbon(t, test.scheme+"://"+f.address()+"/"+apiKey)
		if test.why == "plain Carbon" { // the others answer
			c.dialer.Timeout = 200 * time.Millisecond
		}
		for range 2 {
			err := c.post(t.Context(), onePoint)
			if got := errorText(err); got != test.want {
				t.Errorf("%s: %s, want %s", test.why, got, test.want)
			}
		}
		if c.witness != nil {
			t.Errorf("%s: after it there is a witness", test.why)
		}
		if len(f.got()) > 0 {
			t.Errorf("%s: it got %s", test.why, f.got())
		}
	}

	// Where the witness ends, too, there was a kill, and a proxy may tell of it in any order: nobody
	// asks about TLS then.
	f := newFakeCarbon(t)
	c := mustCarbon(t, "carbon://"+f.address()+"/"+apiKey)
	f.fails(1, func(conn *net.TCPConn) {
		conn.Read(make([]byte, 1))
		conn.SetLinger(0)
		conn.Close()
		time.Sleep(100 * time.Millisecond) // that is how much later the witness ends
		f.die()
	})
	if got := errorText(c.post(t.Context(), onePoint)); runtime.GOOS != "windows" &&
		got != "read tcp "+f.address()+": read: connection reset by peer" {
		t.Errorf("killed: %s", got)
	}
}

// No mistake in the options shows the prefix.
func TestCarbonPrefixIsNotInErrors(t *testing.T) {
	t.Setenv("SRV_BACKSTOP", "")
	for _, scheme := range []string{"carbon", "carbons"} {
		for _, rest := range []string{
			"://user:" + apiKey + "@h:1", "://" + apiKey + "@h:1/x", "://h:1/" + apiKey + "?x",
			"://h:1/x?" + apiKey, "://h:1/x#" + apiKey, "://:1/" + apiKey, ":///" + apiKey,
			":h:1/" + apiKey, "://h:0/" + apiKey, "://h:65536/" + apiKey, "://h:" + apiKey,
			"://h:1/a..b/" + apiKey, "://h:1/" + apiKey + "/publish", "://h:1/ü" + apiKey,
			"://h:1/%zz" + apiKey, "://h:1/\n" + apiKey, "://h:1/" + longPath(300) + apiKey,
			"//h:1/" + apiKey, "z://h:1/" + apiKey, "://[h:1/" + apiKey, "://h:1 /" + apiKey,
		} {
			for _, args := range [][]string{
				{"--backstop=" + scheme + rest}, {"--backstop='" + scheme + rest + "'"},
				{"--backstop:" + scheme + rest}, {"--backstop=-", scheme + rest},
				{"--docker=" + scheme + rest},
			} {
				_, err := parseOptions(args)
				if err == nil || strings.Contains(err.Error(), apiKey) {
					t.Errorf("%q: %v", args, err)
				}
			}
		}
		for _, option := range []string{"host", "prefix", "spool", "poll", "per", "concurrency"} {
			_, err := parseOptions([]string{"--" + option + "=" + scheme + "://h:1/" + apiKey})
			if err == nil || strings.Contains(err.Error(), apiKey) {
				t.Errorf("--%s: %v", option, err)
			}
		}
	}
	file := filepath.Join(t.TempDir(), "url")
	harness.Must(t, os.WriteFile(file, []byte("carbons://h/"+apiKey), 0o600))
	for _, path := range []string{file, "carbon://h:1/" + apiKey} {
		t.Setenv("SRV_BACKSTOP_FILE", path)
		if _, err := parseOptions(nil); err == nil || strings.Contains(err.Error(), apiKey) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// badRequest answers as an HTTP server does.
func badRequest(conn *net.TCPConn) {
	io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
	io.Copy(io.Discard, conn)
}

// The log of a whole run and what systemd is told do not show the prefix, whatever happens.
func TestCarbonPrefixIsNotInTheLog(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("systemd and SSL_CERT_FILE are for Linux")
	}
	for _, scheme := range []string{"carbon", "carbons"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			runWithPrefix(t, scheme)
		})
	}
}

// runWithPrefix is that test for a daemon with a scheme in --backstop.
func runWithPrefix(t *testing.T, scheme string) {
	binary, err := exec.LookPath(program) // see testscript.Main
	harness.Must(t, err)
	dir := t.TempDir()
	systemd, err := net.ListenPacket("unixgram", filepath.Join(dir, "systemd"))
	harness.Must(t, err)
	defer systemd.Close()
	var log, told harness.Log
	go func() {
		for state := make([]byte, 4<<10); ; {
			n, _, err := systemd.ReadFrom(state)
			if err != nil {
				return
			}
			told.Write(append(state[:n:n], '\n'))
		}
	}()
	cert, file := selfSigned(t, nextYear, "127.0.0.1")
	harness.Must(t, os.WriteFile(filepath.Join(dir, "ca.pem"), file, 0o600))
	f := newFakeCarbon(t)
	address := f.address()
	f.die()
	daemon := exec.Command(binary, "--backstop="+scheme+"://"+address+"/"+apiKey, "--verbose",
		"--docker="+harness.NewReplay(t, "cgroup2").URL, "--poll=200ms",
		"--spool="+filepath.Join(dir, "spool"))
	daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+systemd.LocalAddr().String(),
		"SSL_CERT_FILE="+filepath.Join(dir, "ca.pem"))
	daemon.Stderr = &log
	harness.Must(t, daemon.Start())
	defer daemon.Process.Kill()
	harness.AwaitText(t, log.String, "connection refused", 1)
	f.fails(0, badRequest)
	f.listen(t, address)
	harness.AwaitText(t, log.String, "--backstop begin", 1) // with another scheme
	if f.fails(0, nil); scheme == "carbons" {
		f.overTLS(&tls.Config{Certificates: []tls.Certificate{cert}}, true)
	}
	harness.AwaitText(t, log.String, "reachable again", 1)
	f.die()
	harness.AwaitText(t, log.String, "keeping metrics", 3)
	f.listen(t, address)
	harness.AwaitText(t, log.String, "reachable again", 2)
	harness.Must(t, daemon.Process.Signal(syscall.SIGTERM))
	harness.Must(t, daemon.Wait())
	if !strings.Contains(strings.Join(f.got(), ""), apiKey+".fx-idle.") {
		t.Error("no metric has the prefix")
	}
	if text := log.String() + told.String(); strings.Contains(text, apiKey) ||
		!strings.Contains(text, "to="+scheme+"://"+address+" ") ||
		!strings.Contains(text, "STATUS=") {
		t.Errorf("in the log, and what systemd was told:\n%s", text)
	}
}

// addresses returns a resolver that answers each question with these IPv4 addresses, in this order,
// or with another of them ahead each time.
func addresses(t *testing.T, rotate bool, ips ...string) *net.Resolver {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	harness.Must(t, err)
	t.Cleanup(func() { server.Close() })
	go func() {
		for query := make([]byte, 1<<10); ; {
			n, from, err := server.ReadFrom(query)
			if err != nil {
				return
			}
			end := 12 + bytes.IndexByte(query[12:n], 0) + 5 // of the question, after the header
			answer := slices.Clone(query[:end])
			copy(answer[2:12], "\x81\x80\x00\x01\x00\x00\x00\x00\x00\x00") // an answer, to one question
			if isIPv4 := query[end-3] == 1; isIPv4 {
				if rotate {
					ips = slices.Concat(ips[1:], ips[:1])
				}
				answer[7] = byte(len(ips))
				for _, ip := range ips {
					answer = append(answer, "\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04"...)
					answer = append(answer, net.ParseIP(ip).To4()...)
				}
			}
			server.WriteTo(answer, from)
		}
	}()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", server.LocalAddr().String())
	}
	return &net.Resolver{PreferGo: true, Dial: dial}
}

// A name with several addresses is failover: they are tried in order, batch by batch.
func TestAddressesAreTriedInOrder(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has more than one IPv4 address without a setup")
	}
	ips := []string{"127.0.0.2", "127.0.0.3"}
	type receiver struct {
		up, down func()
		got      func() string
	}
	atCarbon := func(t *testing.T) (to destination, receivers []receiver) {
		port := "0"
		for _, ip := range ips {
			f := &fakeCarbon{}
			f.listen(t, net.JoinHostPort(ip, port))
			t.Cleanup(f.die)
			address := f.address()
			_, port, _ = net.SplitHostPort(address)
			receivers = append(receivers, receiver{func() { f.listen(t, address) }, f.die,
				func() string { return strings.Join(f.got(), "") }})
		}
		c := mustCarbon(t, "carbon://carbon.test:"+port)
		c.early, c.proof, c.dialer.Resolver = 0, 100*time.Millisecond, addresses(t, false, ips...)
		return c.destination(), receivers
	}
	atBackstop := func(t *testing.T) (to destination, receivers []receiver) {
		port := "0"
		for _, ip := range ips {
			s := harness.UnstartedStandIn(t.Errorf)
			address := net.JoinHostPort(ip, port)
			up := func() {
				listener, err := net.Listen("tcp", address)
				harness.Must(t, err)
				s.Server = httptest.NewUnstartedServer(s)
				s.Listener.Close()
				s.Listener = listener
				s.Start()
				address = listener.Addr().String()
			}
			up()
			t.Cleanup(func() { s.Stop() })
			_, port, _ = net.SplitHostPort(address)
			receivers = append(receivers, receiver{up, func() { s.Stop() }, s.Lines})
		}
		b := mustBackstop(t, "http://backstop.test:"+port+"/publish/docker")
		dialer := &net.Dialer{Timeout: postTimeout, Resolver: addresses(t, false, ips...)}
		b.transport.DialContext = dialer.DialContext
		return b.destination(), receivers
	}
	for name, start := range map[string]func(*testing.T) (destination, []receiver){
		"Carbon": atCarbon, "Backstop": atBackstop,
	} {
		t.Run(name, func(t *testing.T) {
			to, receivers := start(t)
			r, log := newRig(t, to, 8<<20, "")
			r.pauses = pauses{first: 10 * time.Millisecond, longest: 20 * time.Millisecond}
			end := delivering(t, r)
			first, second := receivers[0], receivers[1]
			n := 0
			arrives := func(at, not receiver) {
				t.Helper()
				n += 10
				r.put(points(n, 10))
				line := string(points(n, 1)[0].appendLine(nil))
				await(t, "a batch is delivered", func() bool { return r.waiting() == 0 })
				if !strings.Contains(at.got(), line) || strings.Contains(not.got(), line) {
					t.Errorf("batch %d went elsewhere\n%s", n/10, log)
				}
			}
			arrives(first, second)
			first.down()
			arrives(second, first)
			arrives(second, first)
			first.up()
			second.down()
			arrives(first, second)
			second.up()
			arrives(first, second)
			harness.Must(t, end())
		})
	}
}

// A batch goes where its witness is, whatever the name server says next.
func TestCarbonStaysWithItsWitness(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has more than one IPv4 address without a setup")
	}
	one, other := newFakeCarbon(t), &fakeCarbon{}
	_, port, _ := net.SplitHostPort(one.address())
	other.listen(t, net.JoinHostPort("127.0.0.2", port))
	t.Cleanup(other.die)
	c := mustCarbon(t, "carbon://carbon.test:"+port)
	c.early, c.dialer.Resolver = 0, addresses(t, true, "127.0.0.1", "127.0.0.2")
	for n := range 2 {
		harness.Must(t, c.post(t.Context(), encode(points(0, 2500))))
		harness.Must(t, c.confirm())
		if a, b := len(one.got()), len(other.got()); a+b != 3*(n+1) || a%3 != 0 {
			t.Errorf("%d and %d portions", a, b)
		}
	}
	if len(one.got()) == 0 || len(other.got()) == 0 {
		t.Error("all went to the same address")
	}
}
