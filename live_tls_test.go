//go:build linux

package main

import (
	"crypto/x509"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
)

// secured is a carbon-cache, and before it something that takes TLS, as docs/install.md has it.
type secured struct {
	carbon *carbonCache
	front  *server
	client *carbon
}

// secure returns both, not started.
func secure(t *testing.T, command, debian string) *secured {
	t.Helper()
	s := &secured{carbon: newCarbonCache(t, "1s:2h")}
	front, dir := newServer(t, command, debian)
	_, file := selfSigned(t, nextYear, front.address)
	s.front, s.client = front, mustCarbon(t, "carbons://"+front.hostPort())
	s.client.tls.RootCAs = x509.NewCertPool()
	s.client.tls.RootCAs.AppendCertsFromPEM(file)
	cert, config := filepath.Join(dir, "carbon.pem"), filepath.Join(dir, "config")
	harness.Must(t, os.WriteFile(cert, file, 0o600))

	// The example is the one that has what only such a configuration has.
	own := map[string]string{"haproxy": "mode tcp", "stunnel4": "accept =",
		"carbon-c-relay": "listen type"}[command]
	text := ""
	for _, example := range regexp.MustCompile(`(?m)(^    .*\n)+`).FindAllString(
		harness.Section(t, "docs/install.md", "### TLS to Carbon"), -1) {
		if strings.Contains(example, own) {
			text = strings.ReplaceAll(example, "\n    ", "\n")[4:]
		}
	}
	text = strings.NewReplacer("192.0.2.1:2003", front.hostPort(), "127.0.0.1:2003",
		s.carbon.hostPort(), "/etc/ssl/carbon.pem", cert).Replace(text)
	switch command {
	case "haproxy":
		front.command = append(front.command, "-db", "-f", config)
	case "stunnel4":
		front.command = append(front.command, config)
		text = "foreground = yes\npid =\n" + text
	default:
		front.command = append(front.command, "-f", config)
	}
	harness.Must(t, os.WriteFile(config, []byte(text), 0o600))
	return s
}

// Everything that is sampled is in Whisper's files in the end, whatever ends or freezes meanwhile,
// where the witness reaches Carbon: HAProxy and stunnel. It reaches as far as carbon-c-relay, which
// reads for itself: what that holds for a Carbon that is away ends with it.
func TestLiveCarbonWithTLS(t *testing.T) {
	t.Parallel()
	now := time.Now().Unix()
	for _, test := range []struct {
		command, debian string
		toCarbon        bool // whether Carbon ends, too
	}{
		{"haproxy", "haproxy", true}, {"stunnel4", "stunnel4", true},
		{"carbon-c-relay", "carbon-c-relay", false},
	} {
		t.Run(test.command, func(t *testing.T) {
			t.Parallel()
			s := secure(t, test.command, test.debian)
			f := feedTo(t, s.client, 20, now-3600, 1)
			s.carbon.start()
			s.front.start()
			end := delivering(t, f.rig)
			stop := f.sampling(500 * time.Millisecond)
			time.Sleep(carbonProof) // so that something is confirmed
			for i := range 6 {
				time.Sleep(rand.N(3 * time.Second)) // the random moment
				ends, frozen := interface {
					start()
					signal(syscall.Signal)
				}(s.front), s.front.running
				if test.toCarbon && i%2 == 0 {
					ends, frozen = s.carbon, s.carbon.running
				}
				switch {
				case i < 2:
					ends.signal(syscall.SIGKILL)
					ends.start()
				case i < 4:
					frozen.Process.Signal(syscall.SIGSTOP)
					time.Sleep(rand.N(3 * time.Second)) // the random moment
					frozen.Process.Signal(syscall.SIGCONT)
				case test.toCarbon:
					ends.signal(syscall.SIGTERM)
					ends.start()
				}
			}
			stop()
			f.arrives(t, s.carbon)
			harness.Must(t, end())
			if !strings.Contains(f.log.String(), "reachable again") {
				t.Errorf("nothing happened:\n%s", f.log)
			}
		})
	}
}

// What is at the wrong port is told, and nothing is taken for delivered: those that take TLS, a
// Carbon that does not, and its port for pickle.
func TestLiveCarbonAtTheWrongPort(t *testing.T) {
	t.Parallel()
	tells := func(url, want string) {
		t.Helper()
		c := mustCarbon(t, url)
		if strings.Contains(want, "is there TLS") { // for it says nothing
			c.dialer.Timeout = time.Second
		}
		for range 2 {
			if got := errorText(c.post(t.Context(), onePoint)); !strings.HasSuffix(got, want) {
				t.Errorf("%s: %s, want %s", url, got, want)
			}
		}
	}
	for command, debian := range map[string]string{
		"haproxy": "haproxy", "stunnel4": "stunnel4", "carbon-c-relay": "carbon-c-relay",
	} {
		s := secure(t, command, debian)
		s.carbon.start()
		s.front.start()
		tells("carbon://"+s.front.hostPort(), "; is this TLS? Then --backstop begins with carbons://")
		tells("carbons://"+s.front.hostPort(), "or name its file in SSL_CERT_FILE")
		tells("carbons://"+s.carbon.hostPort(),
			"; is there TLS at that address? If not, --backstop begins with carbon://")
	}
	c := newCarbonCache(t, "1s:2h")
	config := filepath.Join(c.dir, "carbon.conf")
	text, err := os.ReadFile(config)
	harness.Must(t, err)
	swapped := strings.NewReplacer("LINE_RECEIVER_PORT = "+livePort, "LINE_RECEIVER_PORT = 0",
		"PICKLE_RECEIVER_PORT = 0", "PICKLE_RECEIVER_PORT = "+livePort+"\nPICKLE_RECEIVER_INTERFACE = "+
			c.address)
	harness.Must(t, os.WriteFile(config, []byte(swapped.Replace(string(text))), 0o600))
	c.start()
	tells("carbon://"+c.hostPort(), "; is this TLS? Then --backstop begins with carbons://")
}
