package main

import (
	"math"
	"strconv"
)

// metric is one point of a Graphite series.
type metric struct {
	name  string // a safe Graphite path: see graphitePath
	value value
	time  int64 // Unix seconds
}

// value is a number as the metric contract has them: never negative, whole with all the
// digits of a uint64, or with up to three digits after the point.
type value struct {
	n          uint64
	thousandth bool // the unit of n
}

func whole(n uint64) value { return value{n: n} }

// decimal rounds f to three digits. ok is false where f is none of the contract's numbers:
// negative, infinite, not a number, or beyond all reason.
func decimal(f float64) (v value, ok bool) {
	thousandths := math.Round(f * 1000)
	if !(thousandths >= 0 && thousandths < 1<<53) {
		return value{}, false
	}
	return value{uint64(thousandths), true}, true
}

// append appends v in plain decimal notation, which JSON and Carbon share.
func (v value) append(b []byte) []byte {
	if !v.thousandth {
		return strconv.AppendUint(b, v.n, 10)
	}
	b = strconv.AppendUint(b, v.n/1000, 10)
	if rest := v.n % 1000; rest > 0 {
		digits := strconv.AppendUint(nil, 1000+rest, 10)[1:]
		for digits[len(digits)-1] == '0' {
			digits = digits[:len(digits)-1]
		}
		b = append(append(b, '.'), digits...)
	}
	return b
}

// appendLine appends m as a line of Carbon's plaintext protocol, "name value timestamp":
// https://graphite.readthedocs.io/en/latest/feeding-carbon.html#the-plaintext-protocol.
func (m metric) appendLine(b []byte) []byte {
	b = append(b, m.name...)
	b = append(b, ' ')
	b = m.value.append(b)
	b = append(b, ' ')
	b = strconv.AppendInt(b, m.time, 10)
	return append(b, '\n')
}

// appendJSON appends m in the form in which Backstop takes it:
// https://github.com/obfuscurity/backstop#sending-metrics.
func (m metric) appendJSON(b []byte) []byte {
	b = append(b, `{"metric":"`...)
	b = append(b, m.name...) // a Graphite path has nothing in it to escape
	b = append(b, `","value":`...)
	b = m.value.append(b)
	b = append(b, `,"measure_time":`...)
	b = strconv.AppendInt(b, m.time, 10)
	return append(b, '}')
}

// encode makes metrics the body of a request to Backstop.
func encode(metrics []metric) []byte {
	body := make([]byte, 0, 2+100*len(metrics))
	body = append(body, '[')
	for i, m := range metrics {
		if i > 0 {
			body = append(body, ',')
		}
		body = m.appendJSON(body)
	}
	return append(body, ']')
}
