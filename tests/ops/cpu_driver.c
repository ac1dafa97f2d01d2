/* Calls the CPU kernels on arrays of exactly the promised size, so that the sanitizers see any step outside them.
   With the argument "overrun", one array is a float short: the mutant that the sanitizers must catch. */

#include "delta_memory.c"
#include <stdio.h>

static int64_t short_by;

static Array array(int64_t n, int64_t bf16) {
    Array x = {malloc((bf16 ? 2 : 4) * (size_t)n + !n), bf16};
    for (int64_t i = 0; i < n; i++) {
        const float value = (float)(i * 2654435761u % 1000) / 8000 - .125f; /* below 0, and small, so that nothing grows */
        if (bf16)
            ((uint16_t *)x.data)[i] = to_bf16(value);
        else
            ((float *)x.data)[i] = value;
    }
    return x;
}

static float *floats(int64_t n) { return (float *)array(n, 0).data; }

static void release(const Call *c) {
    void *all[] = {c->q.data, c->k.data, c->value.data, c->log_decay.data, c->erase.data, c->beta.data, (void *)c->A_log,
                   (void *)c->dt_bias, (void *)c->state, c->out.data, c->end_state, c->checkpoints, c->d_out.data,
                   (void *)c->d_end_state, c->d_q.data, c->d_k.data, c->d_value.data, c->d_log_decay.data,
                   c->d_erase.data, c->d_beta.data, c->d_state, c->d_A_log, c->d_dt_bias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static int sequences(int64_t K, int64_t V, int64_t H, int64_t HV, const int64_t *cu, int64_t N, int64_t bf16, int kind) {
    const int64_t T = cu[N], qs = T * H * K, vs = T * HV * V, gs = T * HV * K, bs = T * HV, ss = N * HV * K * V;
    Call c = {.sequences = N, .key_heads = H, .value_heads = HV, .K = K, .V = V, .threads = 2, .cu = cu, .scale = .5,
              .q = array(qs, bf16), .k = array(qs, bf16), .value = array(vs, bf16), .log_decay = array(gs, 0),
              .state = floats(ss), .out = array(vs - short_by, bf16), .end_state = floats(ss),
              .checkpoints = floats((T / SEGMENT + N) * HV * K * V), .d_out = array(vs, bf16), .d_end_state = floats(ss),
              .d_q = array(qs, bf16), .d_k = array(qs, bf16), .d_value = array(vs, bf16), .d_log_decay = array(gs, 0),
              .d_state = floats(ss)};
    if (kind < 0)
        c.erase = array(gs, bf16), c.d_erase = array(gs, bf16);
    else
        c.beta = array(bs, 0), c.d_beta = array(bs, 0), c.gate = kind;
    if (kind > 0) {
        c.floor = -5, c.A_log = floats(HV), c.dt_bias = floats(HV * K);
        c.d_A_log = floats(N * HV), c.d_dt_bias = floats(N * HV * K);
    }
    float *checkpoints = c.checkpoints;
    c.checkpoints = 0;
    int failed = delta_memory_forward(&c);
    c.checkpoints = checkpoints;
    failed |= delta_memory_forward(&c) | delta_memory_backward(&c);
    for (int64_t i = 0; i < ss; i++) failed |= c.end_state[i] != c.end_state[i] || c.d_state[i] != c.d_state[i];
    release(&c);
    return failed;
}

static int steps(int64_t K, int64_t V, int64_t H, int64_t HV, int64_t bf16) {
    const int64_t B = 3;
    void *all[] = {array(B * H * K, bf16).data, array(B * H * K, bf16).data, array(B * HV * V, bf16).data,
                   array(B * HV * K, 0).data, array(B * HV, 0).data, floats(B * HV * K * V), array(B * HV * V, bf16).data};
    delta_memory_step(B, H, HV, K, V, 2, bf16 ? 7 : 0, .5, all[0], all[1], all[2], all[3], all[4], all[5], all[6]);
    int failed = ((float *)all[5])[0] != ((float *)all[5])[0];
    for (int i = 0; i < 7; i++) free(all[i]);
    return failed;
}

int main(int argc, char **argv) {
    (void)argv;
    short_by = argc > 1;
    const int64_t sizes[][4] = {{1, 1, 1, 1}, {5, 3, 1, 2}, {17, 33, 2, 2}, {40, 72, 1, 5}, {64, 64, 2, 4}, {256, 7, 1, 1}};
    const int64_t whole[] = {0, 1}, long_one[] = {0, 83}, packed[] = {0, 0, 6, 70, 70, 87, 87};
    int calls = 0;
    for (int i = 0; i < 6; i++) {
        const int64_t *s = sizes[i];
        for (int kind = -1; kind <= SIGMOID; kind++, calls += 2) {
            if (sequences(s[0], s[1], s[2], s[3], i % 2 ? packed : long_one, i % 2 ? 6 : 1, kind % 2, kind)) return 1;
            if (sequences(s[0], s[1], s[2], s[3], whole, 1, 1 - kind % 2 * kind, kind)) return 1;
        }
        for (int bf16 = 0; bf16 < 2; bf16++, calls++)
            if (steps(s[0], s[1], s[2], s[3], bf16)) return 1;
    }
    for (int i = 0; i < 4; i++, calls++)
        if (steps(8, sizes[i][1], 1, 1, 0)) return 1;
    printf("%d calls\n", calls);
    return 0;
}
