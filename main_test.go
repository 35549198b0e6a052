package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deliverous/docker-stats-to-backstop/script/harness"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestScripts holds the command to what testdata/script says of it. Each script has an engine,
// $ENGINE, that answers with what was recorded of one, and a stand-in for Backstop,
// $BACKSTOP (with the path, without credentials), and these commands of its own:
//
//	backstop auth user:password    from here on it wants these credentials
//	backstop answer STATUS TEXT    from here on it answers so
//	backstop hang                  or not at all
//	backstop ok                    as usual again
//	backstop drop                  the same, and the requests it has are cut off
//	[!] arrives REGEXP [N]         N points, by default 1, are or will be there whose name matches
//	engine hang NAME | PATH        from here on that container's stats, or that path, hang
//	engine forget NAME | PATH      … or are there no more
//	engine well NAME | PATH        … or are there again
//	[!] received REGEXP [N]        N lines, by default 1, were written to Carbon, $CARBON
//	awaits FILE REGEXP             the file has, or will have, a line that matches
func TestScripts(t *testing.T) {
	t.Parallel()
	type host struct {
		engine   *harness.Replay
		backstop *harness.StandIn
		carbon   *fakeCarbon
	}
	this := func(ts *testscript.TestScript) host { return ts.Value(host{}).(host) }
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			h := host{harness.NewReplay(t, "cgroup2"), harness.UnstartedStandIn(t.Errorf), newFakeCarbon(t)}
			h.backstop.Server = httptest.NewServer(h.backstop)
			env.Defer(h.backstop.Stop)
			env.Values[host{}] = h
			env.Setenv("ENGINE", h.engine.URL)
			env.Setenv("BACKSTOP", h.backstop.URL+"/publish/docker")
			env.Setenv("CARBON", "carbon://"+h.carbon.address())
			env.Setenv("BACKSTOP_HOST", strings.TrimPrefix(h.backstop.URL, "http://"))
			// A socket that is not there, so that no script meets the real engine by chance.
			env.Setenv("DOCKER_HOST", "unix://"+env.WorkDir+"/docker.sock")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"backstop": func(ts *testscript.TestScript, _ bool, args []string) {
				s := this(ts).backstop
				switch args[0] {
				case "auth":
					s.Set(args[1], nil)
				case "answer":
					status, err := strconv.Atoi(args[1])
					ts.Check(err)
					s.Set("", harness.AnswerWith(status, args[2]))
				case "hang":
					s.Set("", harness.Hang)
				case "ok":
					s.Set("", nil)
				case "drop":
					s.Set("", nil)
					s.Drop()
				default:
					ts.Fatalf("backstop %s?", args[0])
				}
			},
			"engine": func(ts *testscript.TestScript, _ bool, args []string) {
				path := args[1]
				if !strings.HasPrefix(path, "/") {
					path = "/containers/" + path + "/stats"
				}
				answer := map[string]http.HandlerFunc{"hang": harness.Hang,
					"forget": harness.AnswerWith(404, "{}")}[args[0]]
				this(ts).engine.On(path, answer)
				name, isStats := strings.CutSuffix(path, "/stats")
				if isStats && args[0] != "hang" {
					this(ts).engine.On(name+"/json", answer)
				}
			},
			"arrives": func(ts *testscript.TestScript, not bool, args []string) {
				want, within := 1, time.Minute
				if len(args) > 1 {
					var err error
					want, err = strconv.Atoi(args[1])
					ts.Check(err)
				}
				if not {
					within = 0
				}
				if err := this(ts).backstop.Await(args[0], want, within); (err != nil) != not {
					ts.Fatalf("%v; there are\n%s", err, this(ts).backstop.Lines())
				}
			},
			"received": func(ts *testscript.TestScript, not bool, args []string) {
				want := 1
				if len(args) > 1 {
					var err error
					want, err = strconv.Atoi(args[1])
					ts.Check(err)
				}
				text := strings.Join(this(ts).carbon.got(), "")
				n := len(regexp.MustCompile("(?m)"+args[0]).FindAllString(text, -1))
				if (n >= want) == not {
					ts.Fatalf("%d lines match %s in\n%s", n, args[0], text)
				}
			},
			"awaits": func(ts *testscript.TestScript, _ bool, args []string) {
				re := regexp.MustCompile(args[1])
				for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
					text, err := os.ReadFile(ts.MkAbs(args[0]))
					if err == nil && re.Match(text) {
						return
					}
					if time.Now().After(deadline) {
						ts.Fatalf("%s lacks %s: %s %v", args[0], args[1], text, err)
					}
				}
			},
		},
	})
}

// A disk that is slow when the time to stop is up still gets its two seconds.
func TestEndWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	log := &harness.Log{}
	r := harness.NewReplay(t, "cgroup2")
	c, _ := collecting(t, r.URL, time.Second)
	q := newQueue(1<<20, log.Logger())
	harness.Must(t, q.useSpool(&spool{dir: newDir(t), log: log.Logger()}))
	polling, stop := context.WithCancel(t.Context())
	sending, abort := context.WithCancelCause(t.Context())
	q.works.Lock() // the disk hangs
	to := destination{name: "Backstop", remote: true}
	to.post = func(ctx context.Context, _ []byte) error {
		stop()
		abort(errors.New("time is up"))
		time.AfterFunc(storeWait/4, q.works.Unlock)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	p := &pipeline{collector: c, queue: q, delivery: newDelivery(to, q, func() {}, log.Logger()),
		service: newService(time.Hour, q), log: log.Logger()}
	p.daemon(polling, sending, time.Hour)
	if got := log.String(); !regexp.MustCompile(`lost=0 kept=[1-9]`).MatchString(got) {
		t.Errorf("logged\n%s", got)
	}
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

// hasEnded reports whether a daemon ends in time. strace keeps the thread that waits for the disk
// for a while: the first one is a zombie then, or, if that is the one, it is alone.
func hasEnded(daemon *exec.Cmd, within time.Duration) bool {
	path := fmt.Sprintf("/proc/%d/", daemon.Process.Pid)
	for late := time.Now().Add(within); time.Now().Before(late); time.Sleep(50 * time.Millisecond) {
		stat, err := os.ReadFile(path + "stat")
		threads, _ := os.ReadDir(path + "task")
		if err != nil || bytes.Contains(stat, []byte(") Z ")) || len(threads) == 1 {
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
	binary := built(t)
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
	if peak := peakOf(t, daemon.Process.Pid); peak > limit+30 {
		t.Errorf("the process takes %d MiB with a limit of %d MiB", peak, limit)
	}
}

// built returns a binary. Not the one in PATH: with the race detector, a program needs many times
// as much memory.
func built(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), program)
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	return path
}

// peakOf returns the most memory that a process has had, in MiB.
func peakOf(t *testing.T, pid int) (mebibytes int) {
	t.Helper()
	status := harness.ReadFile(t, fmt.Sprintf("/proc/%d/status", pid))
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindStringSubmatch(status)
	kB, err := strconv.Atoi(m[1])
	harness.Must(t, err)
	return kB >> 10
}

// Answers of the engine cost little memory, whatever is in them.
func TestAnswersCostLittleMemory(t *testing.T) {
	t.Parallel()
	binary := built(t)
	fill := func(entry string) string {
		return "[" + strings.Repeat(entry+",", (maxAnswer-100)/(len(entry)+1)) + entry + "]"
	}
	var containers []string
	for i := range 100 {
		containers = append(containers, fmt.Sprintf(`{"Id":"%d","Names":["/c%[1]d"]}`, i))
	}
	large := `{"x":"` + strings.Repeat("x", 750<<10) + `",` + smallStats[1:]
	for _, test := range []struct {
		why, list, poll, until string
		polls, most            int // MiB
	}{
		{"a list of objects", fill("{}"), "1m", "the answer has over 50000 entries", 1, 400},
		{"a list of numbers", fill("0"), "1m", "the answer has over 50000 entries", 1, 400},
		{"one large answer of a hundred", "[" + strings.Join(containers, ",") + "]", "1s",
			"msg=polled running=100 failed=0", 10, 25},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch path := r.URL.Path; {
			case path == "/containers/json":
				io.WriteString(w, test.list)
			case path == "/containers/7/stats":
				io.WriteString(w, large)
			case strings.HasSuffix(path, "/stats"):
				io.WriteString(w, smallStats)
			case strings.HasSuffix(path, "/json"):
				io.WriteString(w, smallInspect)
			case path == "/info":
				io.WriteString(w, `{"Name":"h"}`)
			}
		}))
		t.Cleanup(s.Close)
		daemon := exec.Command(binary, "--docker="+s.URL, "--poll="+test.poll, "--verbose")
		log := &harness.Log{}
		daemon.Stderr = log
		harness.Must(t, daemon.Start())
		harness.AwaitText(t, log.String, test.until, test.polls)
		peak := peakOf(t, daemon.Process.Pid)
		harness.Must(t, daemon.Process.Kill())
		_ = daemon.Wait()
		if peak > test.most {
			t.Errorf("%s takes %d MiB, more than %d", test.why, peak, test.most)
		}
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
