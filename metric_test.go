package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
)

func TestPathNodesFitIntoFileNames(t *testing.T) {
	if path := graphitePath("a\nroot.forged 1 2\n"); path != "a_root.forged_1_2_" {
		t.Errorf("a path that is two lines: %q", path)
	}
	if path := graphitePath(strings.Repeat(strings.Repeat("a", 250)+".", 70)); len(path) > 1024 ||
		strings.HasSuffix(path, ".") {
		t.Errorf("a path of %d bytes", len(path))
	}
	path := graphitePath(strings.Repeat("a", 300) + "." + strings.Repeat("ü", 300))
	if want := strings.Repeat("a", 255) + "." + strings.Repeat("_", 255); path != want {
		t.Errorf("got nodes of %d bytes in all", len(path))
	}
}

func TestMetricOnTheWire(t *testing.T) {
	m := metric{"web", ".cpu.total", whole(math.MaxUint64), 1795409680}
	got := string(m.appendLine(nil))
	if want := "web.cpu.total 18446744073709551615 1795409680\n"; got != want {
		t.Errorf("plaintext: %q, want %q", got, want)
	}
	p, _ := decimal(12.5)
	body := encode([]metric{m, {"web.cpu", ".percent", p, 1795409681}})
	if want := `[{"metric":"web.cpu.total","value":18446744073709551615,"measure_time":1795409680},` +
		`{"metric":"web.cpu.percent","value":12.5,"measure_time":1795409681}]`; string(body) != want ||
		!json.Valid(body) {
		t.Errorf("JSON: %s, want %s", body, want)
	}
	if got := string(encode(nil)); got != "[]" {
		t.Errorf("JSON of nothing: %s", got)
	}
}

func TestDecimals(t *testing.T) {
	for f, want := range map[float64]string{
		0: "0", 1: "1", 0.0004: "0", 0.0005: "0.001", 0.001: "0.001", 0.01: "0.01", 0.1: "0.1",
		29.9199: "29.92",
		99.9996: "100", 1234567.8901: "1234567.89", 1e12: "1000000000000",
	} {
		v, ok := decimal(f)
		if got := string(v.append(nil)); !ok || got != want {
			t.Errorf("%v: %s %t, want %s", f, got, ok, want)
		}
	}
	for _, f := range []float64{-1, math.NaN(), math.Inf(1), math.Inf(-1), 1e300} {
		if v, ok := decimal(f); ok {
			t.Errorf("%v was taken as %s", f, v.append(nil))
		}
	}
}

func TestDecodeUndoesEncode(t *testing.T) {
	p, _ := decimal(12.5)
	q, _ := decimal(0.001)
	metrics := []metric{
		{"web", ".cpu.total", whole(math.MaxUint64), 1795409680}, {"web", ".cpu.percent", p,
			1795409681}, {"", "a.b", q, 1}, {"", "a", whole(0), 9_999_999_999},
	}
	got, err := decode(encode(metrics))
	if err != nil || asLines(got) != asLines(metrics) {
		t.Errorf("%s %v, want %s", asLines(got), err, asLines(metrics))
	}
	for body, want := range map[string]string{
		``:      "not metrics in JSON: ",
		`[] []`: "not metrics in JSON: ",
		`[1]`:   "not metrics in JSON: ",
		`[{"metric":"a","value":1,"measure_time":1.5}]`: "not metrics in JSON: ",
		`[{"metric":"a","value":1,"measure_time":1},{}]`: `item 2 is no metric: "" = ` +
			`"" at 0`,
		`[{"metric":"a b","value":1,"measure_time":1}]`: `item 1 is no metric: "a b" ` +
			`= "1" at 1`,
		`[{"metric":"a\nb.c 1 1","value":1,"measure_time":1}]`: `item 1 is no metric: ` +
			`"a\nb.c 1 1" = "1" at 1`,
		`[{"metric":"a..b","value":1,"measure_time":1}]`:                 `item 1 is no metric`,
		`[{"metric":"a","value":-1,"measure_time":1}]`:                   `item 1 is no metric`,
		`[{"metric":"a","value":1e9,"measure_time":1}]`:                  `item 1 is no metric`,
		`[{"metric":"a","value":1.2345,"measure_time":1}]`:               `item 1 is no metric`,
		`[{"metric":"a","value":1,"measure_time":0}]`:                    `item 1 is no metric`,
		`[{"metric":"a","value":null,"measure_time":1}]`:                 `item 1 is no metric`,
		`[{"metric":"a","value":99999999999999999999,"measure_time":1}]`: `item 1 is no metric`,
	} {
		if got, err := decode([]byte(body)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, error %v", body, got, err)
		}
	}
}

func TestLastOf(t *testing.T) {
	metrics := []metric{{"", "a.b", whole(1), 1}, {"", "a.c", whole(2), 2}}
	for n := range 3 {
		got := string(lastOf(encode(metrics[:n])))
		if want := string(encode(metrics[max(n-1, 0):n])); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
