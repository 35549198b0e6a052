package harness

import (
	"encoding/json"
	"fmt"
	"io"
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

// Replay is an engine made of recorded answers, for what a real one does not do on demand:
// hang, break off, answer rubbish, be another version. Engine is a real one.
type Replay struct {
	*httptest.Server
	t    testing.TB
	dir  string            // of the recorded answers
	name map[string]string // by id

	mu       sync.Mutex
	api      string                      // what its header says, "" for none
	override map[string]http.HandlerFunc // by path, with the container's name in it
	asked    []string                    // paths and queries, likewise
	removed  bool                        // whether it was told that fx-web is not there any more
}

// NewReplay starts an engine that answers as the one that was recorded in dir.
func NewReplay(t testing.TB, dir string) *Replay {
	t.Helper()
	r := &Replay{
		t: t, dir: recorded(t, dir), api: "1.41",
		name: map[string]string{}, override: map[string]http.HandlerFunc{},
	}
	var list []struct {
		ID    string
		Names []string
	}
	Must(t, json.Unmarshal(r.Read("containers.json"), &list))
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

// recorded returns the folder of the answers of an engine.
func recorded(t testing.TB, engine string) string {
	t.Helper()
	return filepath.Join(Top(t), "testdata", "engine", engine)
}

// Read returns a recorded answer.
func (r *Replay) Read(file string) []byte {
	body, err := os.ReadFile(filepath.Join(r.dir, file))
	if err != nil {
		r.t.Error(err)
	}
	return body
}

// Serve returns a handler that answers with a recorded file.
func (r *Replay) Serve(file string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(r.Read(file))
	}
}

// Add makes one more container known by its id.
func (r *Replay) Add(id, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.name[id] = name
}

// Well undoes all that On has done.
func (r *Replay) Well() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.override)
}

// On makes the path, such as /containers/fx-idle/stats, answer by h.
func (r *Replay) On(path string, h http.HandlerFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.override[path] = h
}

// Is makes it an engine with that highest API version, "" for one that does not tell.
func (r *Replay) Is(api string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.api = api
}

// Questions returns what was asked since the last call, sorted.
func (r *Replay) Questions() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	asked := slices.Clone(r.asked)
	r.asked = nil
	slices.Sort(asked)
	return asked
}

var containerPath = regexp.MustCompile(`^/containers/([0-9a-f]{64})/(json|stats)$`)

// ServeHTTP answers as the recorded engine did, or as On says.
func (r *Replay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	path, file := r.find(req)
	question := path
	if req.URL.RawQuery != "" {
		question += "?" + req.URL.RawQuery
	}
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
	case path == "/events": // nothing has happened
	default:
		body, err := os.ReadFile(filepath.Join(r.dir, file))
		if path == "/containers/json" {
			body = r.withoutRemoved(body)
		}
		if file == "" || err != nil { // fx-web is in the lists, but its stats were not recorded
			r.mu.Lock()
			r.removed = r.removed || path == "/containers/fx-web/json"
			r.mu.Unlock()
			w.WriteHeader(http.StatusNotFound)
			w.Write([]byte(`{"message":"No such container"}`))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}
}

// withoutRemoved returns a list without fx-web, once that was asked for: it was removed.
func (r *Replay) withoutRemoved(list []byte) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.removed {
		return list
	}
	var entries []json.RawMessage
	_ = json.Unmarshal(list, &entries)
	entries = slices.DeleteFunc(entries, func(entry json.RawMessage) bool {
		return strings.Contains(string(entry), `"/fx-web"`)
	})
	list, _ = json.Marshal(entries)
	return list
}

// find returns the path of a request, with the container's name in it, and the file of the answer.
func (r *Replay) find(req *http.Request) (path, file string) {
	path = req.URL.Path
	m := containerPath.FindStringSubmatch(path)
	switch {
	case path == "/containers/json" && req.URL.Query().Get("all") == "1":
		return path, "containers-all.json"
	case m == nil:
		return path, map[string]string{"/containers/json": "containers.json", "/info": "info.json"}[path]
	}
	name := r.name[m[1]]
	path = "/containers/" + name + "/" + m[2]
	if !strings.Contains(r.dir, "podman") {
		name = strings.TrimPrefix(name, "fx-")
	}
	switch {
	case m[2] == "json":
		return path, "inspect-" + name + ".json"
	case req.URL.Query().Has("one-shot"):
		return path, "stats-one-shot-" + name + ".json"
	}
	return path, "stats-" + name + ".json"
}

// Crowd starts an engine at a unix socket, with n containers of recorded answers, which takes some
// time for each, and returns its address.
func Crowd(t testing.TB, n int, takes time.Duration) (address string) {
	t.Helper()
	dir := recorded(t, "cgroup1")
	read := func(file string) []byte {
		t.Helper()
		body, err := os.ReadFile(filepath.Join(dir, file))
		Must(t, err)
		return body
	}
	var listed []map[string]any
	Must(t, json.Unmarshal(read("containers.json"), &listed))
	var list []map[string]any
	for i := range n {
		one := maps.Clone(listed[0])
		one["Id"], one["Status"] = fmt.Sprintf("%064x", i), "Up 3 weeks"
		one["Names"] = []string{fmt.Sprintf("/project%d.service%d", i/10, i)}
		list = append(list, one)
	}
	all, err := json.Marshal(list)
	Must(t, err)
	stats, info, inspect := read("stats-one-shot-busy.json"), read("info.json"),
		read("inspect-busy.json")
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "docker.sock"))
	Must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.44")
		switch path := r.URL.Path; {
		case path == "/_ping":
			io.WriteString(w, "OK")
		case path == "/events":
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
	t.Cleanup(func() { server.Close() })
	return "unix://" + listener.Addr().String()
}
