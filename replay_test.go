package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// replay is an engine made of recorded answers, for what a real one does not do on demand:
// hang, break off, answer rubbish, be another version. The real one is in live_test.go.
type replay struct {
	*httptest.Server
	dir  string            // of the recorded answers
	name map[string]string // by id

	mu       sync.Mutex
	api      string                      // what its header says, "" for none
	override map[string]http.HandlerFunc // by path, with the container's name in it
	asked    []string                    // paths and queries, likewise
}

// newReplay starts an engine that answers as the one that was recorded in dir.
func newReplay(t testing.TB, dir string) *replay {
	t.Helper()
	r := &replay{dir: filepath.Join("testdata", "engine", dir), api: "1.41", name: map[string]string{}, override: map[string]http.HandlerFunc{}}
	var list []struct {
		ID    string
		Names []string
	}
	if err := json.Unmarshal(r.read(t, "containers.json"), &list); err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		r.name[c.ID] = strings.TrimPrefix(c.Names[0], "/")
	}
	r.Server = httptest.NewServer(r)
	t.Cleanup(func() {
		r.Server.CloseClientConnections()
		r.Server.Close()
	})
	return r
}

func (r *replay) read(t testing.TB, file string) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join(r.dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// on makes the path, such as /containers/fx-idle/stats, answer by h.
func (r *replay) on(path string, h http.HandlerFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.override[path] = h
}

// is makes it an engine with that highest API version, "" for one that does not tell.
func (r *replay) is(api string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.api = api
}

// questions returns what was asked since the last call, sorted.
func (r *replay) questions() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	asked := slices.Clone(r.asked)
	r.asked = nil
	slices.Sort(asked)
	return asked
}

var containerPath = regexp.MustCompile(`^/containers/([0-9a-f]{64})/(json|stats)$`)

func (r *replay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	path := req.URL.Path
	file := map[string]string{"/containers/json": "containers.json", "/info": "info.json"}[path]
	if m := containerPath.FindStringSubmatch(path); m != nil {
		name := r.name[m[1]]
		path = "/containers/" + name + "/" + m[2]
		short := strings.TrimPrefix(name, "fx-")
		if strings.Contains(r.dir, "podman") {
			short = name
		}
		switch {
		case m[2] == "json":
			file = "inspect-" + short + ".json"
		case req.URL.Query().Has("one-shot"):
			file = "stats-one-shot-" + short + ".json"
		default:
			file = "stats-" + short + ".json"
		}
	}
	question := path
	if req.URL.RawQuery != "" {
		question += "?" + req.URL.RawQuery
	}
	r.mu.Lock()
	r.asked = append(r.asked, question)
	override := r.override[path]
	if r.api != "" {
		w.Header().Set("Api-Version", r.api)
	}
	r.mu.Unlock()

	w.Header().Set("Server", "Docker/20.10.24 (linux)")
	switch {
	case override != nil:
		override(w, req)
	case path == "/_ping":
		w.Write([]byte("OK"))
	default:
		body, err := os.ReadFile(filepath.Join(r.dir, file))
		if file == "" || err != nil { // fx-web is in the lists, but its stats were not recorded
			w.WriteHeader(http.StatusNotFound)
			w.Write([]byte(`{"message":"No such container"}`))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}
}

// collector returns a collector of r's containers whose calls may take as long as timeout, and
// its log.
func (r *replay) collector(t testing.TB, timeout time.Duration) (*collector, *logged) {
	t.Helper()
	e, err := newEngine(r.URL, timeout)
	if err != nil {
		t.Fatal(err)
	}
	log := &logged{}
	return newCollector(e, nil, log.logger()), log
}

// replayCrowd is an engine at a unix socket, with n containers of recorded answers, which takes some time for each.
func replayCrowd(b testing.TB, n int, takes time.Duration) (address string) {
	read := func(file string) []byte {
		body, err := os.ReadFile(filepath.Join("testdata/engine/cgroup1", file))
		if err != nil {
			b.Fatal(err)
		}
		return body
	}
	var listed []map[string]any
	if err := json.Unmarshal(read("containers.json"), &listed); err != nil {
		b.Fatal(err)
	}
	var list []map[string]any
	for i := range n {
		one := maps.Clone(listed[0])
		one["Id"], one["Names"], one["Status"] = fmt.Sprintf("%064x", i), []string{fmt.Sprintf("/project%d.service%d", i/10, i)}, "Up 3 weeks"
		list = append(list, one)
	}
	all, err := json.Marshal(list)
	if err != nil {
		b.Fatal(err)
	}
	stats, info, inspect := read("stats-one-shot-busy.json"), read("info.json"), read("inspect-busy.json")
	listener, err := net.Listen("unix", filepath.Join(b.TempDir(), "docker.sock"))
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.44")
		switch path := r.URL.Path; {
		case path == "/_ping":
			io.WriteString(w, "OK")
		case path == "/info":
			w.Write(info)
		case path == "/containers/json":
			w.Write(all)
		case strings.HasSuffix(path, "/stats"):
			time.Sleep(takes)
			w.Write(stats)
		default:
			w.Write(inspect)
		}
	})}
	go server.Serve(listener)
	b.Cleanup(func() { server.Close() })
	return "unix://" + listener.Addr().String()
}

// logged keeps what is logged.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String returns the lines since the last take.
func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// take returns the lines since the last call, without their times.
func (l *logged) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

// logger returns a logger as the daemon has it, quiet and without times.
func (l *logged) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}
