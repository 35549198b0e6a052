package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// standIn answers as Backstop does, with "docker" as its only prefix, and keeps what Backstop
// would pass to Carbon. It is strict where Backstop is not: a name or a number that breaks the
// metric contract fails the test, as nothing behind Backstop would tell.
type standIn struct {
	*httptest.Server
	complain func(format string, args ...any)

	mu       sync.Mutex
	auth     string            // user:password, "" for none wanted
	fault    http.HandlerFunc  // answers in Backstop's place
	bad      string            // "name time" of a metric that is refused, though it is one
	points   map[string]string // "name time" → value
	requests []int             // items of each request that was taken
	inFlight *int
	patient  bool // whether requests may overlap: a client that gives one up may be back before it is noticed
	// Backstop's connection to Carbon
	roundTrip time.Duration
	deadSince time.Time // when the first line was written to it after Carbon's end, zero if it lives
	dead      bool
	arrived   chan struct{} // closed at the next arrival
}

func newStandIn(t testing.TB) *standIn {
	t.Helper()
	s := unstartedStandIn(t.Errorf)
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.stop)
	return s
}

func unstartedStandIn(complain func(string, ...any)) *standIn {
	return &standIn{complain: complain, points: map[string]string{}, inFlight: new(int), arrived: make(chan struct{})}
}

func (s *standIn) stop() {
	s.CloseClientConnections()
	s.Close()
}

// set changes how the stand-in answers.
func (s *standIn) set(auth string, fault http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.auth, s.fault = auth, fault
}

// drop cuts off the requests that are under way.
func (s *standIn) drop() {
	s.mu.Lock()
	s.inFlight = new(int) // those cut off may take a moment to notice
	s.mu.Unlock()
	s.CloseClientConnections()
}

// await waits until some points whose names match the pattern have arrived, or t fails.
func (s *standIn) await(pattern string, want int, within time.Duration) error {
	re := regexp.MustCompile(pattern)
	deadline := time.After(within)
	for {
		s.mu.Lock()
		arrived, have := s.arrived, 0
		for point := range s.points {
			if re.MatchString(point) {
				have++
			}
		}
		s.mu.Unlock()
		if have >= want {
			return nil
		}
		select {
		case <-arrived:
		case <-deadline:
			return fmt.Errorf("%d points that match %s after %s, want %d", have, pattern, within, want)
		}
	}
}

// lines returns what arrived, as sorted Carbon lines.
func (s *standIn) lines() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var lines []string
	for point, value := range s.points {
		name, at, _ := strings.Cut(point, " ")
		lines = append(lines, name+" "+value+" "+at+"\n")
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

var (
	goodName  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,255}(\.[A-Za-z0-9_-]{1,255})+$`)
	badEnd    = regexp.MustCompile(`\.(max|min|count)$`) // Carbon's default aggregation rules
	goodValue = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]{1,3})?$`)
)

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	inFlight := s.inFlight
	if *inFlight++; *inFlight > 1 && !s.patient {
		s.complain("%d requests in flight", *inFlight)
	}
	fault := s.fault
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		*inFlight--
		s.mu.Unlock()
	}()
	if fault != nil {
		fault(w, r)
		return
	}
	s.answer(w, r)
}

// answer answers as usual.
func (s *standIn) answer(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	auth := s.auth
	s.mu.Unlock()
	status, text := s.take(r, auth)
	w.WriteHeader(status)
	io.WriteString(w, text)
}

// take checks a request in the order in which Backstop does.
func (s *standIn) take(r *http.Request, auth string) (int, string) {
	if user, password, _ := r.BasicAuth(); auth != "" && (user+":"+password != auth || password == "" || strings.ContainsAny(password, ":,")) {
		return http.StatusUnauthorized, "Not authorized\n"
	}
	prefix, ok := strings.CutPrefix(r.URL.Path, "/publish/")
	if !ok || r.Method != http.MethodPost || strings.Contains(prefix, "/") || prefix == "" {
		return http.StatusNotFound, "<!DOCTYPE html>\n<html><body>" + strings.Repeat("Sinatra doesn't know this ditty. ", 4000)
	}
	if prefix != "docker" {
		return http.StatusNotFound, "unknown prefix"
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return http.StatusBadRequest, ""
	}
	kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	var items []map[string]json.RawMessage
	if kind != "application/json" || json.Unmarshal(body, &items) != nil {
		return http.StatusBadRequest, "JSON is required"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, item := range items {
		if len(item["metric"]) == 0 || len(item["value"]) == 0 || len(item["measure_time"]) == 0 {
			return http.StatusBadRequest, "missing fields" // and the items before it are stored
		}
		if s.bad == strings.Trim(string(item["metric"]), `"`)+" "+string(item["measure_time"]) {
			return http.StatusBadRequest, "missing fields"
		}
		s.store(item)
	}
	s.requests = append(s.requests, len(items))
	close(s.arrived)
	s.arrived = make(chan struct{})
	return http.StatusOK, "ok"
}

// restartCarbon leaves the stand-in with a dead connection to Carbon, as a restart of Carbon does with Backstop, that far away.
func (s *standIn) restartCarbon(roundTrip time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roundTrip, s.dead, s.deadSince = roundTrip, true, time.Time{}
}

// reaches tells whether the next line reaches Carbon. Backstop swallows errors of writing. On a dead connection the first write
// succeeds, and so do all others until Carbon's host has answered it, a round trip later; the write after that fails,
// and with the next one Backstop makes a new connection.
func (s *standIn) reaches() bool {
	switch {
	case !s.dead:
		return true
	case s.deadSince.IsZero():
		s.deadSince = time.Now()
	case time.Since(s.deadSince) >= s.roundTrip:
		s.dead = false
	}
	return false
}

func (s *standIn) store(item map[string]json.RawMessage) {
	var name string
	if err := json.Unmarshal(item["metric"], &name); err != nil || !goodName.MatchString(name) || badEnd.MatchString(name) {
		s.complain("metric %s is not one that Graphite can keep", item["metric"])
	}
	if len(item) != 3 {
		s.complain("%s has %d fields", name, len(item))
	}
	value := string(bytes.TrimSpace(item["value"]))
	if !goodValue.MatchString(value) {
		s.complain("%s has the value %s", name, value)
	}
	at, err := strconv.ParseInt(string(item["measure_time"]), 10, 64)
	if err != nil || at < 1_000_000_000 || at > 9_999_999_999 {
		s.complain("%s has the time %s, not whole Unix seconds", name, item["measure_time"])
	}
	if s.reaches() {
		s.points[fmt.Sprintf("%s %d", name, at)] = value
	}
}

// hang is a fault: no answer for as long as the client waits for one.
func hang(_ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // else net/http does not see that the client left
	<-r.Context().Done()
}

// answerWith is a fault: always the same answer.
func answerWith(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}
