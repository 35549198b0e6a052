package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main, "floor": floor})
}

// cannot ends a test that needs what is not there: it is skipped, but where
// REQUIRE_ENGINE is set, as script/test does, it fails.
func cannot(t testing.TB, format string, args ...any) {
	t.Helper()
	why := fmt.Sprintf(format, args...)
	if os.Getenv("REQUIRE_ENGINE") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// noEngine is cannot, for want of an engine or what comes with it.
func noEngine(t testing.TB, format string, args ...any) {
	t.Helper()
	cannot(t, format+"; script/engine brings one", args...)
}

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
//	awaits FILE REGEXP             the file has, or will have, a line that matches
func TestScripts(t *testing.T) {
	type host struct {
		engine   *replay
		backstop *standIn
	}
	this := func(ts *testscript.TestScript) host { return ts.Value(host{}).(host) }
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			h := host{newReplay(t, "cgroup2"), unstartedStandIn(t.Errorf)}
			h.backstop.Server = httptest.NewServer(h.backstop)
			env.Defer(h.backstop.stop)
			env.Values[host{}] = h
			env.Setenv("ENGINE", h.engine.URL)
			env.Setenv("BACKSTOP", h.backstop.URL+"/publish/docker")
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
					s.set(args[1], nil)
				case "answer":
					status, err := strconv.Atoi(args[1])
					ts.Check(err)
					s.set("", answerWith(status, args[2]))
				case "hang":
					s.set("", hang)
				case "ok":
					s.set("", nil)
				case "drop":
					s.set("", nil)
					s.drop()
				default:
					ts.Fatalf("backstop %s?", args[0])
				}
			},
			"engine": func(ts *testscript.TestScript, _ bool, args []string) {
				path := args[1]
				if !strings.HasPrefix(path, "/") {
					path = "/containers/" + path + "/stats"
				}
				this(ts).engine.on(path, map[string]http.HandlerFunc{"hang": hang, "forget": answerWith(404, "{}")}[args[0]])
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
				if err := this(ts).backstop.await(args[0], want, within); (err != nil) != not {
					ts.Fatalf("%v; there are\n%s", err, this(ts).backstop.lines())
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
