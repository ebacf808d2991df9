/* Levels, as calibration works with them, and digits, as they are packed: the one to the other for many units. What a
 * level is, codec/trellis.h says; the way back is its ptqtp_trellis_digits, made for bulk: a sum instead of the first
 * lap, a table instead of the arithmetic of the second. */
#include "codec/levels.h"
#include "codec/trellis.h"

enum { NONE = 255, COLUMNS = 16, MAX_LEVEL = 6, OUTSIDE = 2 * MAX_LEVEL + 1 };

static const uint8_t chain[PTQTP_UNIT] = { PTQTP_CHAIN_ORDER };

int ptqtp_levels_piece(int type, const uint8_t * digits, int8_t * levels, int64_t n) {
    uint8_t high = 0;
    for (int64_t i = 0; i < n; i++) {
        high |= digits[i] > 8;
    }
    if (high) {
        return PTQTP_BAD_DIGIT;
    }
    if (type == PTQTP_TP2_2) {
        for (int64_t i = 0; i < n; i += PTQTP_UNIT) {
            ptqtp_trellis_levels(digits + i, levels + i);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            levels[i] = ptqtp_level[digits[i]];
        }
    }
    return PTQTP_OK;
}

/* Steps along the chain, at COLUMNS * state + level + MAX_LEVEL: the digit, or NONE, and COLUMNS * the next state. No
 * level in column OUTSIDE has a digit. */
struct steps {
    uint8_t digit[PTQTP_STATES * COLUMNS];
    uint8_t next[PTQTP_STATES * COLUMNS];
};

static void fill_steps(struct steps * s) {
    memset(s->digit, NONE, sizeof s->digit);
    memset(s->next, 0, sizeof s->next);
    for (int state = 0; state < PTQTP_STATES; state++) {
        for (int digit = 0; digit < 9; digit++) {
            const int before2 = state / 3 - 1, before = state % 3 - 1;
            const int level = ptqtp_level[digit] + ptqtp_bal(before + before2);
            const int at = COLUMNS * state + level + MAX_LEVEL;
            s->digit[at] = (uint8_t) digit;
            s->next[at] = (uint8_t) (COLUMNS * (3 * (before + 1) + digit % 3));
        }
    }
}

/* What a level adds, mod 3, to the two trits in which a lap from zero ends, by weight. t2 = t2[-1] + t2[-2] - level: a
 * level 1 is answered, from its own weight on, by the Fibonacci numbers mod 3 with the sign changed. */
struct ends {
    int8_t last[PTQTP_UNIT], last2[PTQTP_UNIT];
};

static void fill_ends(struct ends * e) {
    int answer = -1, before = 0;
    for (int c = PTQTP_UNIT - 1; c >= 0; c--) {
        e->last[chain[c]] = (int8_t) answer;
        e->last2[chain[c]] = (int8_t) before; /* one step less behind it */
        const int next = ptqtp_bal(answer + before);
        before = answer;
        answer = next;
    }
}

static void trellis_digits(const int8_t * levels, uint8_t * digits, int64_t n) {
    struct steps steps;
    struct ends ends;
    fill_steps(&steps);
    fill_ends(&ends);
    for (int64_t i = 0; i < n; i += PTQTP_UNIT, levels += PTQTP_UNIT, digits += PTQTP_UNIT) {
        uint8_t column[PTQTP_UNIT];
        int last = 0, last2 = 0;
        for (int k = 0; k < PTQTP_UNIT; k++) {
            const uint8_t from_least = (uint8_t) (levels[k] + MAX_LEVEL);
            column[k] = from_least < OUTSIDE ? from_least : OUTSIDE;
            last += (int16_t) (ends.last[k] * levels[k]);
            last2 += (int16_t) (ends.last2[k] * levels[k]);
        }
        const int start = COLUMNS * (3 * (ptqtp_bal(last2 % 3) + 1) + ptqtp_bal(last % 3) + 1);
        int at = start;
        uint8_t all = 0;
        for (int c = 0; c < PTQTP_UNIT; c++) {
            const int step = at + column[chain[c]];
            const uint8_t digit = steps.digit[step];
            digits[chain[c]] = digit;
            all |= digit;
            at = steps.next[step];
        }
        if (all == NONE || at != COLUMNS * (PTQTP_STATES - 1) - start) {
            memset(digits, NONE, PTQTP_UNIT);
        }
    }
}

void ptqtp_digits_piece(int type, const int8_t * levels, uint8_t * digits, int64_t n) {
    if (type == PTQTP_TP2_2) {
        trellis_digits(levels, digits, n);
        return;
    }
    uint8_t digit_of[256]; /* by the level's byte */
    memset(digit_of, NONE, sizeof digit_of);
    for (int digit = 0; digit < 9; digit++) {
        digit_of[(uint8_t) ptqtp_level[digit]] = (uint8_t) digit;
    }
    for (int64_t i = 0; i < n; i++) {
        digits[i] = digit_of[(uint8_t) levels[i]];
    }
}
